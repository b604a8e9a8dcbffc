"""Every tolerance of the tests, with its reason."""

import torch

TOLERANCES = {
    # int8 weights and activations: 30 dB or better per layer, a few layers deep
    "int8_step": 0.05,
    # float8_e4m3fn has 3 bits of mantissa: 25 dB per layer
    "fp8_step": 0.1,
    # a few layers deep: the same codes up to a rounding tie, but the kernels may write bf16 and attention run in bf16
    "kernels_vs_reference_step": 0.02,
    # one fused norm, GEGLU or attention against the same in several calls: a rounding tie is one step in a few thousand values
    "rounding_ties": 1e-2,
    # one operator against the reference of the same codes, fp32 output: order of summation only
    "int8_operator": 1e-5,
    # the reference lowering against modelopt's fake quantisation, fp32: w / s and w * (127 / amax) part ways at rounding ties,
    # and an fp16 weight that is half the largest of its channel is one (127 / 2): a few codes of a layer, each off by one
    "modelopt_layer": 1e-3,
    # a whole toy step: those, carried through ten layers
    "modelopt_step": 1e-3,
    # an exported int8 file against the reference lowering, a whole step: rounding ties of the activations part ways
    "int8_export_cosine": 0.9999,
    # noise of an exported file over that of the reference lowering, both against full precision: equal up to chance. A whole
    # fp8 step is bounded by this alone: after some layers its rounding ties have cost as much as fp8 itself
    "export_noise_ratio": 1.5,
    # every tensor of an exported file when the tensors before it are the reference's: fp16, and single rounding ties
    "layer_export_cosine": 0.9999,
    # a tiny random model of a family, whole step, int8: the ranges are those of four calls, the mean over which clips up to a few
    # per cent of a range; 30 noisy layers of the same size, most of them in residuals. Measured: 0.03 to 0.12
    "family_step": 0.15,
    # the same of more families, some of which hold a step to max_error, 0.2, by leaving layers out on the first input, and are
    # judged on another one. Measured: 0.01 to 0.25
    "more_families_step": 0.3,
    # such a step compiled, against the reference lowering of the same layers on the same inputs. 8-bit sums are the same numbers;
    # what differs are roundings of fp32, and the few codes that they tip over
    "family_cosine": 0.9999,
    # where a step is further than that: 1 - cosine over that of the reference to itself, its inputs changed by 1e-6. A difference
    # d in front of a quantiser of step s tips d / s of the codes over, by s each, so that it leaves as sqrt(d * s): some layers
    # later it is a share of the noise of quantisation, whatever it was. UNets get there, whose images are thousands of values.
    # Largest quotient that was seen: 1.6
    "family_ties": 3.0,
    # dB of each of its layers on the call after that picture. Such ranges clip: 11 dB were seen in layers that read the timestep
    # alone, 13 behind an attention over 16 tokens, 17 or more elsewhere. A wrong scale or layout leaves 6 dB at best
    "family_layer_db": 10.0,
    # dB that 8-bit pictures of a pipeline that takes more than text may be farther from its own full precision than those of
    # text-to-image are from theirs. There is no reason for more: its timesteps, pictures and residuals are what it calibrates on
    "pipeline_db": 1.0,
    # of a single value beside its relative bound: below the smallest normal number of fp16 all roundings are this large
    "smallest": 2.0**-24,
}

# Bounds of a single operation that is fed exact inputs (test_teacher_forcing.py): |y - exact| <= n * UNIT * sizes + one rounding
# of the result's dtype, where ``sizes`` is the sum of the absolute values of all terms that were added or rounded on the way.
# n: a sum of K terms has an error of about sqrt(K) roundings (Higham & Mary 2019, theorem 2.4: lambda * sqrt(K), where roundings
# are independent; lambda is 1 here, because kernels keep 8 or more partial sums: 0.4 of it is the most that was seen); every
# other call is a few roundings
ROUNDINGS = {
    "sum": 1.0,
    # a factor, its reciprocal, a cast, exp, tanh, erf or rsqrt of a library, which are good to about two units each
    "call": 4.0,
    # as "sum", of what tensor cores cut: they keep one partial sum, and of a million results the worst is five deviations out,
    # each cut's being 1 / sqrt(3) of it at most; half of that, as most partial sums are smaller than the largest. 0.7 of it was
    # the most that was seen
    "cut": 2.0,
}
# fp8 products on a GPU: Hopper's tensor cores add at 14 bits (DeepSeek-V3 report, section 3.3.2), in fp32 numbers only: each of K
# terms is cut at 2**-13 of the largest number in sight, which is a partial sum or a term. Partial sums of terms of either sign
# go as far as the result and some deviations of a random walk, whose square is the sum of the squared terms
FP8_CUT, WALK = 2.0**-13, 3.0
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
