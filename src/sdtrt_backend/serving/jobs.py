"""``sdtrt batch``: the pictures of many prompts, drawn by Ray Data with one painter per GPU, on any number of hosts.

The folder is the state. A picture's file is named by what is asked and of which model, and is written whole, so what is there is
done, and the same call goes on after a stop. Which pictures are drawn in one call follows from the prompts file alone, not from
what is there already or from the number of actors, so a job that was stopped gives the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import socket
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..errors import OptionError, RequestError, SdtrtError
from ..files import Unusable, digest, lock_of, locked, read_json, write_atomically, write_json
from .ask import FIELDS, Ask, Facts, checked
from .painter import Painter, Setup

MANIFEST, FACTS = "manifest.jsonl", "facts.json"  # of the folder
SCHEMA = 1  # of FACTS
PNG_BEGINS, PNG_ENDS = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SAMPLE = 65536  # bytes of a file's beginning and end that identify it: a header, and weights, which training changes all over
MOST_BLOCKS = 4096  # Ray Data keeps each in its tables; what a block drew is known when it is finished
LOG_SECONDS = 30.0  # between two lines of progress in a file
CONNECT_SECONDS = 10.0
TRIES, TRYING = 2, ".trying"  # of a call that ends the process that draws it
DIED = f"the process that drew it died {TRIES} times (out of memory? then with a smaller batch); the same call tries it again"


@dataclass(frozen=True)
class Line:
    """A line of the prompts file. number: from 1; given: ``FIELDS`` as they stand there; error: why it is not to be drawn."""

    number: int
    given: Mapping[str, Any] = field(default_factory=dict)
    id: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Wanted:
    """A line, what it asks for and the name of its picture's file; of a line that cannot be drawn both are None."""

    line: Line
    ask: Ask | None
    file: str | None
    error: str | None

    def entry(self, seconds: float | None = None, batch: int | None = None, error: str | None = None) -> dict[str, Any]:
        """Its line of the manifest. seconds: of the call that drew it; batch: pictures of that call."""
        asked = self.ask.to_json() if self.ask else {name: self.line.given.get(name) for name in FIELDS}
        error = self.error or error
        return {"line": self.line.number, "id": self.line.id, **asked, "file": None if error else self.file, "seconds": seconds,
                "batch": batch, "error": error}


@dataclass(frozen=True)
class Result:
    """Of a picture, as an actor tells it. seconds, batch: None where the file was there."""

    file: str
    seconds: float | None
    batch: int | None
    error: str | None


@dataclass(frozen=True)
class Summary:
    """Lines of the prompts file: kept are those whose picture was there, drawn those of now."""

    drawn: int
    kept: int
    failed: int
    manifest: Path


def read_lines(path: Path) -> list[Line]:
    """The lines that are not empty: of a .txt a prompt each, else a JSON object each. Raises SdtrtError where there is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SdtrtError(f"prompts file {path} cannot be read ({error.strerror}): expected a JSON object per line, such as "
                         '{"prompt": "a red fox"}, or a .txt with a prompt per line') from None
    read = _text_line if path.suffix.lower() == ".txt" else _json_line
    # not str.splitlines, which also splits where a JSON text may hold a line separator of Unicode
    lines = [read(n, raw) for n, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1) if raw.strip()]
    if not lines:
        raise SdtrtError(f'prompts file {path} is empty: write a JSON object per line, such as {{"prompt": "a red fox"}}')
    return lines


def _text_line(number: int, raw: bytes) -> Line:
    try:
        return Line(number, {"prompt": raw.decode().strip()})
    except UnicodeDecodeError as error:
        return Line(number, error=f"line {number} is not UTF-8 ({error.reason})")


def _json_line(number: int, raw: bytes) -> Line:
    try:
        found = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"line {number} is no JSON ({error})")
    if not isinstance(found, dict):
        return Line(number, error=f"line {number} is no JSON object: expected one such as {{\"prompt\": \"a red fox\"}}")
    return Line(number, {name: value for name, value in found.items() if name != "id"}, found.get("id"))


def wanted(lines: Iterable[Line], facts: Facts, model: str) -> list[Wanted]:
    """What each line asks for. model: of ``identity``."""
    return [_wanted(line, facts, model) for line in lines]


def _wanted(line: Line, facts: Facts, model: str) -> Wanted:
    if line.error:
        return Wanted(line, None, None, line.error)
    given = dict(line.given)
    if given.get("seed") is None:  # a random one would give another picture after a stop
        given["seed"] = int(digest({"line": line.number, **given})[:8], 16)
    try:
        ask = checked(given, facts)
    except RequestError as error:
        return Wanted(line, None, None, f"line {line.number}: {error}")
    return Wanted(line, ask, f"{digest({'ask': ask.to_json(), 'model': model})}.png", None)


def calls(asked: Iterable[Wanted], most: int) -> list[list[Wanted]]:
    """Pictures of one call each, at most ``most``, all ``alike``; each file once, in the order of the lines."""
    groups: dict[Hashable, dict[str | None, Wanted]] = {}
    for w in asked:
        if w.ask:
            groups.setdefault(w.ask.alike, {}).setdefault(w.file, w)
    lists = [list(group.values()) for group in groups.values()]
    return [group[i: i + most] for group in lists for i in range(0, len(group), most)]


def identity(setup: Setup) -> str:
    """SHA-256 of what, beside an ask, decides how its picture looks: the model's files, how it is quantised, the LoRAs' files.

    Neither the size of batches nor threads are in it: a job that was stopped may go on with others, and keeps its pictures.
    """
    made: dict[str, Any] = {"model": _files(setup.model), "backend": setup.backend, "dtype": setup.dtype}
    if setup.backend:
        made |= {"recipe": _files(setup.recipe), "bundle": setup.bundle and _sampled(Path(setup.bundle)),
                 "loras": _files(setup.loras), "parts": setup.parts,
                 "options": repr(sorted(setup.options.items()))}
    if setup.calibrates:
        made |= {"prompts": setup.prompts, "steps": setup.steps, "sizes": setup.sizes}
    return digest(made)


def _files(folder: str | None) -> list[tuple[str, int, str]] | None:
    """(name, bytes, SHA-256 of the beginning and the end) of each file, wherever the folder is. Raises OptionError without it."""
    if folder is None:
        return None
    root, found = Path(folder), []
    if not root.is_dir():
        raise OptionError(f"there is no folder {folder}; all hosts of a batch job read it under this name")
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root)
        if not any(part.startswith(".") for part in name.parts):
            found.append((name.as_posix(), path.stat().st_size, _sampled(path)))
    return found


def _sampled(path: Path) -> str:
    with path.open("rb") as file:
        begin = file.read(SAMPLE)
        file.seek(max(0, path.stat().st_size - SAMPLE))
        return hashlib.sha256(begin + file.read(SAMPLE)).hexdigest()


def is_picture(path: Path) -> bool:
    """Whether a whole PNG is there, told by its first and last bytes: thousands are looked at on every start."""
    try:
        with path.open("rb") as file:
            begin = file.read(len(PNG_BEGINS))
            file.seek(-len(PNG_ENDS), os.SEEK_END)
            return begin == PNG_BEGINS and file.read() == PNG_ENDS
    except OSError:  # none, or shorter than that
        return False


class Manifest:
    """``manifest.jsonl`` of a folder: appended while pictures come, put in the order of the lines when a job begins and ends."""

    def __init__(self, folder: Path, asked: Sequence[Wanted]) -> None:
        self.path = folder / MANIFEST
        self.asked = asked
        known = {e["file"]: (e.get("seconds"), e.get("batch")) for e in _entries(self.path) if e.get("file")}
        self.entries: dict[int, dict[str, Any]] = {}
        for w in asked:
            if w.error:
                self.entries[w.line.number] = w.entry()
            elif is_picture(folder / str(w.file)):
                # without seconds: a stop came between the picture and its entry
                self.entries[w.line.number] = w.entry(*known.get(w.file, (None, None)))
        self.write()
        self.file: IO[str] = self.path.open("a")

    @cached_property
    def lines_of(self) -> dict[str | None, list[Wanted]]:
        """File -> the lines that ask for it."""
        found: dict[str | None, list[Wanted]] = {}
        for w in self.asked:
            found.setdefault(w.file, []).append(w)
        return found

    def add(self, result: Result) -> int:
        """How many lines it is of."""
        new = [w for w in self.lines_of[result.file] if w.line.number not in self.entries]
        for w in new:
            entry = self.entries[w.line.number] = w.entry(result.seconds, result.batch, result.error)
            self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        return len(new)

    def write(self) -> None:
        """The whole file anew, in the order of the lines."""
        body = "".join(json.dumps(self.entries[n]) + "\n" for n in sorted(self.entries))
        write_atomically(self.path, body.encode())

    @property
    def failed(self) -> int:
        return sum(e["error"] is not None for e in self.entries.values())


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """What can be read of a manifest: the last line may be half written."""
    for raw in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(raw)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


class Actor:
    """One painter in a process of Ray, which writes its pictures itself."""

    def __init__(self, setup: Setup, folder: str) -> None:
        self.folder = Path(folder)
        self.refused = ""  # why this setup makes no painter: of an error raised here the driver would get a traceback alone
        try:
            self.painter = Painter(setup)
            self.painter.warm()
        except SdtrtError as error:
            self.refused = str(error)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """row: "call", JSON of [(file, JSON of an Ask)]; gives "results", JSON of a Result for each, or "refused"."""
        results = [] if self.refused else self.draw(json.loads(row["call"]))
        return {"results": json.dumps([asdict(result) for result in results]), "refused": self.refused}

    def draw(self, call: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Result]:
        """Writes what is not there. A picture that is there is drawn once more where a neighbour of its call is missing, but not
        written: the neighbour comes as in a job that was not stopped."""
        missing = {file for file, _ in call if not is_picture(self.folder / file)}
        done = [Result(file, None, None, None) for file, _ in call if file not in missing]
        if not missing:
            return done
        mark = self.folder / f".{call[0][0]}{TRYING}"  # a byte for each time that this call was begun and not ended
        if mark.is_file() and mark.stat().st_size >= TRIES:
            mark.unlink()
            return done + [Result(file, None, None, DIED) for file in sorted(missing)]
        try:
            with mark.open("ab") as tries:
                tries.write(b".")
            drawn = self.painter.draw([checked(ask, self.painter.facts) for _, ask in call])
            for (file, _), picture in zip(call, drawn.pictures, strict=True):
                if file in missing:
                    write_atomically(self.folder / file, _png(picture))
                    missing.remove(file)
                    done.append(Result(file, round(drawn.seconds, 3), drawn.batch, None))
        except torch.AcceleratorError:
            os._exit(1)  # a CUDA context with this error fails for ever: Ray starts the process anew and repeats the call
        except Exception as error:  # of whatever kind a pipeline raises; the manifest says it, and the rest is drawn
            done += [Result(file, None, None, f"{type(error).__name__}: {error}") for file in sorted(missing)]
        mark.unlink(missing_ok=True)
        return done


def _png(picture: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


def _facts_of(setup: Setup, loras: tuple[str, ...]) -> Facts:
    """In a process of its own that sees no GPU: what is loaded only to be asked takes no memory of one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    plain = replace(setup, backend=None, recipe=None, bundle=None, trust=False, loras=None, dtype="bfloat16")
    return replace(Painter(plain).facts, loras=loras)


def _answers(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray itself tries for many minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Without its news, which break the line of progress; as the user had it afterwards."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


class Cluster:
    """Ray, started when something is first asked of it, and stopped on leaving where it was started here."""

    def __init__(self, setup: Setup, actors: int | None, address: str | None, gpus_per_actor: float) -> None:
        self.setup = setup
        self.actors = actors
        self.address = address
        self.gpus_per_actor = gpus_per_actor
        self.ours = False

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self.ours:
            self.ray.shutdown()

    @cached_property
    def ray(self) -> Any:
        if find_spec("ray") is None or find_spec("pyarrow") is None:
            raise SdtrtError("a batch job needs Ray Data, which is not installed: pip install 'sdtrt_backend[serve]'")
        import ray

        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            here: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            if address == "local" and (self.actors or 0) > (os.cpu_count() or 1):  # an actor has a CPU for itself, else it waits
                here["num_cpus"] = self.actors
            try:
                _answers(address)
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
            except (OSError, ValueError) as error:
                raise SdtrtError(f"there is no Ray cluster at {address} that can be joined ({error}); start one with ray start "
                                 "--head, or leave the address out") from None
            self.ours = True
        return ray

    def facts(self) -> Facts:
        """What a painter of this setup takes. Raises SdtrtError where none can be made."""
        loras = tuple(sorted(path.stem for path in Path(self.setup.loras).glob("*.safetensors"))) if self.setup.loras else ()
        # max_calls: the process ends, and with it its copy of the model
        task = self.ray.remote(num_cpus=1, max_calls=1)(_facts_of)
        with self._understood():
            facts: Facts = self.ray.get(task.remote(self.setup, loras))
        return facts

    def draw(self, todo: Sequence[Sequence[Wanted]], folder: Path) -> Iterator[Result]:
        """The results of these calls, as they come. Raises SdtrtError where no actor can be made, or a host is lost for good."""
        actors, cpus, gpus = self._shares(len(todo))
        from ray.data import ActorPoolStrategy, DataContext, from_items

        quiet = DataContext.get_current().copy()
        quiet.enable_progress_bars = quiet.print_on_execution_start = False
        rows = [{"call": json.dumps([(w.file, w.ask.to_json()) for w in call if w.ask])} for call in todo]
        with DataContext.current(quiet):
            data = from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        # Ray restarts a process that died and repeats its task, for ever: an actor ends that, see TRIES. One task in flight: what
        # waits is for the actor that is free first
        drawn = data.map(cast("Any", Actor), fn_constructor_args=(self.setup, str(folder)), num_cpus=cpus, num_gpus=gpus,
                         compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1))
        with self._understood(), _silent("ray.data"):
            for row in drawn.iter_rows():
                if row["refused"]:
                    raise SdtrtError(row["refused"])
                yield from (Result(**result) for result in json.loads(row["results"]))

    def _shares(self, calls: int) -> tuple[int, int | None, float]:
        """(actors, CPUs of each, GPUs of each). Raises OptionError for more than there is: Ray would wait for ever."""
        hosts = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = self.gpus_per_actor if any(host.get("GPU") for host in hosts) else 0.0
        room = [int(host.get("GPU", 0) / gpus if gpus else host.get("CPU", 0)) for host in hosts]
        room = [actors for actors in room if actors]
        actors = self.actors or (sum(room) if gpus else len(room))
        if not 1 <= actors <= sum(room):
            raise OptionError(f"{actors} actors are asked for, and there is room for {sum(room)}: each has "
                              + (f"{gpus:g} of the GPUs" if gpus else "one of the CPUs, or more"))
        if gpus:
            return min(actors, calls), None, gpus
        # Ray tells torch to use as many threads as an actor has CPUs
        share = max(1, min(room) // ceil(actors / len(room)))
        return min(actors, calls), min(self.setup.threads or share, share), gpus

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """What went wrong in another process as the error that it was there."""
        try:
            yield
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, SdtrtError):
                raise cause from None
            raise SdtrtError(f"no picture can be drawn: {error}") from error


def run_batch(prompts: Path, folder: Path, setup: Setup, *, actors: int | None = None, address: str | None = None,
              gpus_per_actor: float = 1.0) -> Summary:
    """Draw what the lines of ``prompts`` ask for into ``folder``, and go on where an earlier call stopped; progress on stderr.

    folder: on a disk that all hosts share under this name, and so are the setup's own folders. setup.batches: a call draws at
    most the largest. actors: painters at once; None is one per ``gpus_per_actor`` GPUs, and without GPUs one per host. address:
    of a Ray cluster; None is RAY_ADDRESS, else Ray on this machine alone, until all is drawn. Where Ray runs in this process
    already, that is used. Raises SdtrtError where no picture can be drawn; what is wrong with a line or a picture is in the
    manifest.
    """
    setup.check()
    if (actors is not None and actors < 1) or gpus_per_actor <= 0:
        raise OptionError(f"expected at least 1 actor and more than 0 GPUs for each, got {actors} and {gpus_per_actor}")
    setup = replace(setup, model=_absolute(setup.model), recipe=_absolute(setup.recipe), bundle=_absolute(setup.bundle),
                    loras=_absolute(setup.loras))
    lines, model = read_lines(prompts), identity(setup)
    _make(folder)
    folder = folder.resolve()
    with locked(lock_of(folder), wait=False) as mine:
        if not mine:
            raise SdtrtError(f"another batch job writes to {folder}, or no lock of it can be had: wait for it, or name another "
                             "folder")
        with Cluster(setup, actors, address, gpus_per_actor) as cluster:
            asked = wanted(lines, _facts(folder, setup, model, cluster), model)
            return _draw(asked, folder, setup, cluster)


def _absolute(folder: str | None) -> str | None:
    """A process of Ray on another host has another working directory."""
    return str(Path(folder).resolve()) if folder else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SdtrtError(f"{folder} cannot be written to ({error.strerror}): name a folder to write in, or to make") from None


def _facts(folder: Path, setup: Setup, model: str, cluster: Cluster) -> Facts:
    """Of a pipeline that is loaded for it, unless an earlier job of this setup left them in the folder."""
    key = digest({"setup": repr(setup), "model": model})
    with suppress(Unusable):
        body = read_json(folder / FACTS, SCHEMA)
        if body["key"] == key:
            return Facts.from_json(body["facts"])
    facts = cluster.facts()
    write_json(folder / FACTS, SCHEMA, {"key": key, "facts": facts.to_json()})
    return facts


def _draw(asked: Sequence[Wanted], folder: Path, setup: Setup, cluster: Cluster) -> Summary:
    from tqdm.auto import tqdm

    for mark in folder.glob(f".*{TRYING}"):  # of a job that was stopped
        mark.unlink()
    manifest = Manifest(folder, asked)
    kept = len(manifest.entries) - manifest.failed
    todo = [call for call in calls(asked, max(setup.batches)) if any(w.line.number not in manifest.entries for w in call)]
    terminal = sys.stderr.isatty()
    with manifest.file, tqdm(total=len(asked), initial=len(manifest.entries), unit="picture", desc="sdtrt batch",
                             mininterval=0.1 if terminal else LOG_SECONDS, ascii=not terminal) as bar:
        for result in cluster.draw(todo, folder) if todo else ():
            bar.update(manifest.add(result))
            if result.error:
                bar.set_postfix_str(f"{manifest.failed} failed", refresh=False)
    manifest.write()
    return Summary(len(asked) - kept - manifest.failed, kept, manifest.failed, manifest.path)
