"""What Triton's python backend runs: the requests of one dynamic batch, drawn by a painter in groups that are alike."""

from __future__ import annotations

import json
import locale
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ModelError, RequestError
from ..files import read_json, write_json
from .ask import Ask, checked
from .painter import Painter, Setup

SCHEMA = 1
SETUP = "setup.json"
# what a request holds: the names of ``ask.FIELDS`` in capitals, one value a picture. FP64, as the numbers of JSON: a guidance of
# 4.3 is then that of any other door, to the last bit.
INPUTS = {"PROMPT": "TYPE_STRING", "NEGATIVE_PROMPT": "TYPE_STRING", "SIZE": "TYPE_STRING", "STEPS": "TYPE_INT32",
          "GUIDANCE": "TYPE_FP64", "SEED": "TYPE_INT64", "LORAS": "TYPE_STRING"}
OUTPUTS = {"IMAGE": ("TYPE_UINT8", (-1, -1, 3)), "SEED": ("TYPE_INT64", (1,)), "INFO": ("TYPE_STRING", (1,))}


@dataclass(frozen=True)
class Saved:
    """A model of a repository, beside its config. weights: bytes of one instance; memory_budget: bytes of the whole server."""

    setup: Setup
    weights: int
    instances: int
    memory_budget: int | None

    def save(self, version: Path) -> None:
        """Write it into the folder of a version."""
        write_json(version / SETUP, SCHEMA, asdict(self))

    @classmethod
    def load(cls, version: Path) -> Saved:
        """Raises ModelError for a file that is missing, damaged, or of a newer version of this package."""
        body = read_json(version / SETUP, SCHEMA, lambda why: ModelError(
            f"{version} holds no model that this version can serve: {why}; write it with sdtrt export --to triton"))
        setup = body["setup"]
        lists = {name: tuple(setup[name]) for name in ("batches", "prompts")}
        sizes = tuple((width, height) for width, height in setup["sizes"])
        return cls(Setup(**{**setup, **lists, "sizes": sizes}), body["weights"], body["instances"], body["memory_budget"])


@dataclass(frozen=True)
class Result:
    """A picture, uint8 [height, width, 3], the seed it was drawn from, and more on it as JSON."""

    image: np.ndarray[Any, Any]
    seed: int
    info: str


class TritonModel:
    """An instance of a model in a Triton server; its process has this one alone.

    triton: the module ``triton_python_backend_utils``, which there is only in the server; the model.py of a repository sets it.
    """

    triton: Any
    painter: Painter

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the pipeline and draw once in each size and batch; the server is not ready before. args: of Triton."""
        _read_utf8()
        if args["model_instance_kind"] == "GPU":
            _use_gpu(int(args["model_instance_device_id"]))
        log = self.triton.Logger
        self.painter = Painter(Saved.load(Path(args["model_repository"]) / args["model_version"]).setup)
        self.painter.warm(lambda what: log.log_info(f"{args['model_name']}: {what}"))
        state = self.painter.state()
        log.log_info(f"{args['model_name']}: {'; '.join((state['state'], *state['fallbacks'], *state['notes']))}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in their order: its pictures, or the sentence that says what is wrong with it."""
        asked = [self._asked(request) for request in requests]
        results = iter(self._draw([ask for asks in asked if not isinstance(asks, RequestError) for ask in asks]))
        return [self._refusal(asks) if isinstance(asks, RequestError) else self._response(islice(results, len(asks)))
                for asks in asked]

    def _asked(self, request: Any) -> list[Ask] | RequestError:
        try:
            asks = [checked(given, self.painter.facts) for given in self._pictures(request)]
            if not asks:
                raise RequestError("prompt", "prompt expects one text per picture, got none")
            sizes = sorted({f"{ask.width}x{ask.height}" for ask in asks})
            if len(sizes) > 1:
                raise RequestError("size", f"size expects one size for all pictures of a request, as they are answered in one "
                                           f"tensor, got {', '.join(sizes)}: send a request for each")
        except RequestError as error:
            return error
        return asks

    def _pictures(self, request: Any) -> list[dict[str, Any]]:
        """The fields of each picture that a request asks for."""
        tensors = {name: self.triton.get_input_tensor_by_name(request, name) for name in INPUTS}
        given = {name: tensor.as_numpy().reshape(-1).tolist() for name, tensor in tensors.items() if tensor is not None}
        # Triton sees to it that all have one length, but not that there is a PROMPT: with optional inputs, it counts them alone
        rows = zip(*given.values(), strict=True)
        return [{name.lower(): _plain(name, value) for name, value in zip(given, row, strict=True)} for row in rows]

    def _draw(self, asks: Sequence[Ask]) -> list[Result]:
        """In the order of ``asks``, in as few calls as the largest batch allows."""
        groups: dict[Hashable, list[int]] = {}
        for i, ask in enumerate(asks):
            groups.setdefault(ask.alike, []).append(i)
        most = self.painter.facts.batches[-1]
        calls = [group[first : first + most] for group in groups.values() for first in range(0, len(group), most)]
        results: dict[int, Result] = {}
        for places in calls:
            drawn = self.painter.draw([asks[i] for i in places])
            for i, picture in zip(places, drawn.pictures, strict=True):
                info = {**asks[i].to_json(), "seconds": round(drawn.seconds, 3), "batch": drawn.batch}
                results[i] = Result(np.asarray(picture.convert("RGB")), asks[i].seed, json.dumps(info))
        return [results[i] for i in range(len(asks))]

    def _response(self, results: Iterator[Result]) -> Any:
        images, seeds, infos = zip(*((r.image, r.seed, r.info) for r in results), strict=True)
        arrays = {"IMAGE": np.stack(images), "SEED": np.array(seeds, np.int64)[:, None],
                  "INFO": np.array([info.encode() for info in infos], np.object_)[:, None]}
        return self.triton.InferenceResponse([self.triton.Tensor(name, arrays[name]) for name in OUTPUTS])

    def _refusal(self, error: RequestError) -> Any:
        return self.triton.InferenceResponse(error=self.triton.TritonError(str(error), self.triton.TritonError.INVALID_ARG))


def _plain(name: str, value: Any) -> Any:
    """An element of an input's tensor as the field of a request."""
    field = name.lower()
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise RequestError(field, f"{field} is no text in UTF-8") from None
    if name != "LORAS":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RequestError(field, f'loras expects JSON, names and weights, such as {{"ink": 0.8}}, got {value[:60]!r}') from None


def _read_utf8() -> None:
    """Text files are UTF-8 in this process. Before Triton 2.52 its Python takes nothing from the environment and all files for
    ASCII, which the sources that Inductor reads are not, so that nothing could be built."""
    if locale.getencoding().upper() not in ("UTF-8", "UTF8"):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")


def _use_gpu(device: int) -> None:
    """The one that Triton gives this instance is this process's from now on."""
    if not torch.cuda.is_available():
        raise ModelError(f"Triton gives this instance GPU {device}, and the torch of its Python sees none: install a torch for "
                         "CUDA there, or start the server with CUDA_VISIBLE_DEVICES= (empty), so that it runs on the CPU")
    torch.cuda.set_device(device)
