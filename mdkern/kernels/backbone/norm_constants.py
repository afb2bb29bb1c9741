"""Numbers that the norms' references and kernels share."""

EPS = 1e-5  # of `torch.nn.functional.layer_norm`
# A row of a folded weight is rounded, and its sum then is not 0. What it is off goes to its entries near 0, whose grid
# is fine, in so many rounds; then one entry takes the rest. Constant modulation makes rounding go one way: one entry
# alone would be off by more than their spread.
ROUNDS = 3
NEAR_ZERO = 0.2  # of the row's root mean square
