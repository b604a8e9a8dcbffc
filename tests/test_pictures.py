"""A pipeline is asked by keyword, with what its call takes, and each prompt gets its own picture."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy import ToyDenoiser

import sdtrt_backend
from sdtrt_backend.errors import CalibrationError
from sdtrt_backend.pictures import asked


class Recorded:
    """A pipeline that draws with a denoiser and keeps what it was called with."""

    def __init__(self):
        self.unet, self.calls = ToyDenoiser(0).eval(), []

    def draw(self, steps, count, **given):
        self.calls.append(given)
        for t in reversed(range(steps)):
            self.unet(torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(t)), torch.tensor(t),
                      torch.zeros(count, 5, 64))


class Edit(Recorded):
    """Takes the picture first, as the pipelines do that change one."""

    def __call__(self, image=None, prompt=None, mask_image=None, strength=0.8, num_inference_steps=3, sigmas=None, generator=None,
                 output_type="pil"):
        self.draw(num_inference_steps, len(prompt), image=image, prompt=prompt, mask_image=mask_image, strength=strength,
                  sigmas=sigmas, output_type=output_type)


class Video(Recorded):
    """Takes a picture and no prompt, and no output_type."""

    def __call__(self, image, num_inference_steps=3, generator=None):
        self.draw(num_inference_steps, 1, image=image)


def pictures(count):
    return [Image.fromarray(np.full((8, 8, 3), i, np.uint8)) for i in range(count)]


def calibrated(pipe, prompts, **given):
    return sdtrt_backend.calibrate(pipe, prompts, num_inference_steps=3, progress=False, **given)


def test_prompts_go_by_name_where_the_picture_comes_first():
    pipe, one = Edit(), pictures(1)[0]
    recipe = calibrated(pipe, ["a", "b"], image=one, strength=0.5)
    assert [c["prompt"] for c in pipe.calls] == [["a"], ["b"]]
    assert all(c["image"] is one and c["strength"] == 0.5 and c["output_type"] == "latent" for c in pipe.calls)
    assert recipe.provenance["prompts"] == 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_each_prompt_has_its_own_picture_and_mask_and_a_schedule_is_one_for_all(batch_size):
    pipe, images, mask = Edit(), pictures(3), pictures(1)[0]
    calibrated(pipe, ["a", "b", "c"], image=images, mask_image=mask, sigmas=[0.9, 0.5, 0.1], batch_size=batch_size)
    given = [images[:2], images[2]] if batch_size == 2 else images
    assert [c["image"] for c in pipe.calls] == given
    assert all(c["mask_image"] is mask and c["sigmas"] == [0.9, 0.5, 0.1] for c in pipe.calls)


def test_a_list_of_another_length_is_one_value():
    pipe, references = Edit(), pictures(2)
    calibrated(pipe, ["a", "b", "c"], image=references)
    assert all(c["image"] == references for c in pipe.calls)


def test_judging_prompts_have_their_own_pictures():
    pipe, images = Edit(), pictures(8)
    ask = asked(pipe, list("abcdefgh"), {"image": images})
    ask.draw([6], num_inference_steps=1, guidance_scale=3.0)
    assert (pipe.calls[-1]["prompt"], pipe.calls[-1]["image"]) == (["g"], images[6])


def test_a_pipeline_without_prompts_runs_once_for_each_picture():
    pipe, images = Video(), pictures(2)
    recipe = calibrated(pipe, None, image=images)
    assert [c["image"] for c in pipe.calls] == images
    assert recipe.provenance["prompts"] == 2


def test_prompts_for_a_pipeline_that_takes_none_are_refused():
    pipe = Video()
    with pytest.raises(CalibrationError, match=r"Video takes no prompts: pass None .* it takes image, num_inference_steps"):
        calibrated(pipe, ["a"], image=pictures(1))
    assert pipe.calls == []


def test_an_argument_that_the_pipeline_does_not_take_is_refused_with_the_one_that_it_does():
    pipe = Edit()
    with pytest.raises(CalibrationError, match=r"Edit takes no argument 'mask': .* did you mean mask_image"):
        calibrated(pipe, ["a"], mask=pictures(1)[0])
    with pytest.raises(CalibrationError, match=r"takes no argument 'guidance_scale'"):
        calibrated(pipe, ["a"], guidance_scale=5.0)
    assert pipe.calls == []


def test_a_calibration_with_pictures_goes_on_and_notices_another_one(tmp_path):
    images = pictures(2)
    whole = calibrated(Edit(), ["a", "b"], image=images)
    assert calibrated(Edit(), ["a", "b"], image=images, resume=tmp_path).content_hash() == whole.content_hash()
    with pytest.raises(CalibrationError, match="argument image"):
        calibrated(Edit(), ["a", "b"], image=images[::-1], resume=tmp_path)


def test_an_image_to_image_pipeline_of_diffusers_calibrates_with_a_picture_for_each_prompt():
    from diffusers import StableDiffusionImg2ImgPipeline

    plain = sdtrt_backend.demo_pipeline()
    pipe = StableDiffusionImg2ImgPipeline(**plain.components)
    pipe.set_progress_bar_config(disable=True)
    images = [Image.fromarray(np.full((64, 64, 3), 60 * i, np.uint8)) for i in range(2)]
    recipe = sdtrt_backend.calibrate(pipe, ["red apple", "owl"], image=images, strength=0.5, num_inference_steps=4,
                                     progress=False)
    assert len(recipe.layers) > 100
    assert len(recipe.timesteps) == 2
    assert "saw 2 different timesteps, as a picture of strength 0.5 starts from less noise" in recipe.provenance["note"]
