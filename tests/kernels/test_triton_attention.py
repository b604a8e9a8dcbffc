"""Attention against float64: on the GPU, and on the CPU under Triton's interpreter."""

import pytest
import torch
from interpreted import DEVICE, FP8, INT8, INTERPRETED, assert_written, on_device, on_gpu, poisoned, run_interpreted, saturating

HALF, BF16 = torch.float16, torch.bfloat16
NOISE = {HALF: 1e-3, BF16: 8e-3}  # the probabilities are rounded to the dtype of v


def merged(images, heads, tokens, width, parts, dtype):
    """``parts`` of one projection [images, tokens, parts * heads * width], each [images, heads, tokens, width]."""
    x = torch.randn(images, tokens, parts * heads * width, device=DEVICE).to(dtype)
    return [part.view(images, tokens, heads, width).transpose(1, 2) for part in x.chunk(parts, -1)]


def check(images, heads, queries, tokens, width, dtype=HALF, out=None, per_channel=False, config=None, sharpness=2.0):
    from sdtrt_backend.kernels.triton_attention import attention

    out = out or dtype
    if queries == tokens:
        q, k, v = merged(images, heads, queries, width, 3, dtype)
    else:
        (q,), (k, v) = (merged(images, heads, tokens_, width, parts, dtype) for tokens_, parts in ((queries, 1), (tokens, 2)))
    scale = sharpness * width**-0.5
    exact = torch.softmax(q.double() @ k.double().mT * scale, -1) @ v.double()
    factor = saturating(exact, out, (heads, 1, width) if per_channel else (1,))
    with poisoned():
        y = attention(q, k, v, scale, factor.view(-1), out, config)
    assert y.shape == q.shape
    assert y.dtype == out
    assert y.transpose(1, 2).is_contiguous()
    assert_written(y, exact, factor, NOISE[dtype] * exact.abs().max())


if not INTERPRETED:
    @pytest.mark.slow
    def test_this_file_passes_under_the_interpreter():
        run_interpreted(__file__)


@on_device
@pytest.mark.parametrize("tokens", [24, 77, 150])
@pytest.mark.parametrize("out", [None, INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_attention_writes_any_dtype(dtype, out, tokens):
    for per_channel in (False, True):
        check(2, 3, 70, tokens, 40, dtype, out, per_channel)


@on_device
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 33, 64, 65, 77, 80, 81, 97, 127, 128, 129, 192, 200])
def test_attention_over_any_number_of_keys(tokens):
    for queries in (3, 65):
        check(1, 2, queries, tokens, 16, out=INT8)


@on_device
@pytest.mark.parametrize("width", [16, 24, 40, 64, 80, 128, 160, 256])
@pytest.mark.parametrize("tokens", [77, 140])
def test_attention_of_any_width(width, tokens):
    check(1, 2, 33, tokens, width)


@on_device
@pytest.mark.parametrize("size", [19, 77, 131])
def test_attention_reads_a_merged_projection(size):
    check(2, 2, size, size, 40)


@on_device
@pytest.mark.parametrize("tokens", [77, 140])
def test_attention_reads_strides_that_are_no_multiple_of_8(tokens):
    from sdtrt_backend.kernels.triton_attention import attention

    q, k, v = (torch.randn(2, 2, tokens, 27, device=DEVICE).half()[..., :24] for _ in range(3))
    exact = torch.softmax(q.double() @ k.double().mT * 0.3, -1) @ v.double()
    assert_written(attention(q, k, v, 0.3, None, HALF), exact, None, NOISE[HALF])


@on_device
@pytest.mark.parametrize("tokens", [77, 300])
def test_attention_survives_large_logits(tokens):
    check(1, 2, 40, tokens, 64, sharpness=60.0)


@on_device
@pytest.mark.parametrize("tiles", [2, 3])
def test_short_attention_with_several_tiles_of_queries(tiles):
    from sdtrt_backend.kernels.triton_attention import AttentionConfig

    for queries in (5, 16 * tiles, 16 * tiles + 1, 100):
        check(1, 2, queries, 77, 16, out=INT8, config=AttentionConfig(16, 0, 4, 2, tiles))


@on_device
@pytest.mark.parametrize(("tokens", "blocks"), [(1, (16, 0)), (16, (16, 0)), (17, (32, 0)), (33, (32, 16)), (64, (64, 0)),
                                                (77, (64, 16)), (96, (64, 32)), (97, (128, 0)), (128, (128, 0))])
def test_blocks_of_keys_waste_little(tokens, blocks):
    from sdtrt_backend.kernels.triton_attention import key_blocks

    assert key_blocks(tokens) == blocks


@on_device
def test_attention_refuses_what_it_cannot_read():
    from sdtrt_backend.kernels.triton_attention import SHORT_CONFIGS, attention

    q = torch.randn(1, 2, 140, 24, device=DEVICE).half()
    for wrong, match in ((q.float(), "fp16 or bf16"), (q[..., :20], "multiple of 8"), (q.mT.contiguous().mT, "contiguous")):
        with pytest.raises(ValueError, match=match):
            attention(wrong, wrong, wrong, 0.2, None, HALF)
    with pytest.raises(ValueError, match="out_scale"):
        attention(q, q, q, 0.2, None, INT8)
    with pytest.raises(ValueError, match="in one block"):
        attention(q, q, q, 0.2, None, HALF, SHORT_CONFIGS[0])


@on_gpu
@on_device
@pytest.mark.parametrize("shape", [(2, 20, 1024, 77, 64), (2, 10, 4096, 77, 64), (2, 8, 4096, 77, 40), (1, 3, 1000, 128, 80)],
                         ids=str)
@pytest.mark.parametrize("index", range(8))
def test_short_attention_with_every_shipped_config(index, shape):
    from sdtrt_backend.kernels.triton_attention import SHORT_CONFIGS

    for out in (HALF, INT8):
        check(*shape, out=out, config=SHORT_CONFIGS[index])


@on_gpu
@on_device
@pytest.mark.parametrize("shape", [(2, 20, 1024, 1024, 64), (1, 2, 4096, 4096, 64), (2, 8, 1000, 1000, 40)], ids=str)
@pytest.mark.parametrize("index", range(6))
def test_flash_attention_with_every_shipped_config(index, shape):
    from sdtrt_backend.kernels.triton_attention import FLASH_CONFIGS

    for out in (HALF, INT8):
        check(*shape, out=out, config=FLASH_CONFIGS[index], sharpness=4.0)
