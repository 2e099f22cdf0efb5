"""What ranks send for a term: chosen by bytes, from numbers that all of them have."""

from ._request import Request


def covariance_strategy(
    asked: str, ranks: int, capacity: int, dimensions: int, wire: int, width: int
) -> str:
    """Name "gram" or "feature"; "" for no covariance.

    All samples, ``W N_l D`` numbers of ``wire`` bytes, against half of a symmetric matrix there and
    back, ``D^2`` numbers of ``width`` bytes; the operations are in the same ratio.

    Args:
        asked: the option; "auto" chooses.
        ranks: W.
        capacity: N_l.
        dimensions: D.
        wire: bytes of a number of a sample as it is sent.
        width: bytes of a number that is computed.
    """
    if asked != "auto":
        return asked
    return "gram" if ranks * capacity * wire <= dimensions * width else "feature"


def sketch_strategy(
    request: Request, slices: int, ranks: int, dimensions: int, wire: int, width: int
) -> str:
    """Name "slices", "samples" or "sums"; "" for no sketch.

    For a rank's sample, K projections there and back, against D numbers from each of W ranks there
    and as many back. Slices of each rank's own need all samples there; sums of harmonics are small.
    """
    if not request.sketch:
        return ""
    if request.own_slices:
        return "samples"
    if request.sketch == "epps_pulley":
        return "samples" if request.exchange == "samples" else "sums"
    if request.exchange != "auto":
        return request.exchange
    return "samples" if ranks * dimensions * (wire + width) <= 2 * slices * width else "slices"
