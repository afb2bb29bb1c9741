"""Numbers that the norms' references and kernels share."""

EPS = 1e-5  # of `torch.nn.functional.layer_norm`
# Rounding a row of a folded weight leaves a sum that is not 0. The remainder is spread over the entries near 0, where
# numbers lie close together, in this many rounds; one entry takes what is left. Giving it all to one entry would change
# that entry by more than the row's standard deviation where a constant modulation makes all entries round the same way.
ROUNDS = 3
NEAR_ZERO = 0.2  # "near 0" is below this share of the row's root mean square
