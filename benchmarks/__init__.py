"""Cost of the losses against autograd on the published formulas, measured side by side."""
