"""Self-supervised regularizer losses for PyTorch: VICReg, VISReg and LeJEPA, exact and fast."""

from . import diagnostics as diagnostics
from . import distributed as distributed
from . import functional as functional
from .composites import LeJEPALoss as LeJEPALoss
from .composites import LeJEPATerms as LeJEPATerms
from .composites import VICRegLoss as VICRegLoss
from .composites import VICRegTerms as VICRegTerms
from .composites import VISRegLoss as VISRegLoss
from .composites import VISRegTerms as VISRegTerms
from .modules import CovarianceLoss as CovarianceLoss
from .modules import InvarianceLoss as InvarianceLoss
from .modules import SlicedSketchLoss as SlicedSketchLoss
from .modules import VarianceLoss as VarianceLoss

__version__ = "0.1.0"
