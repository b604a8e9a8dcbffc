"""Every tolerance of the tests, with its reason."""

TOLERANCES = {
    # int8 weights and activations: 30 dB or better per layer, a few layers deep
    "int8_step": 0.05,
    # a few layers deep: the same codes up to a rounding tie, but the kernels may write bf16 and attention run in bf16
    "kernels_vs_reference_step": 0.02,
    # one operator against the reference of the same codes, fp32 output: order of summation only
    "int8_operator": 1e-5,
}
