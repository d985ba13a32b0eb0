"""The way of one cell: base and data in, a record out. Run as a child of `supervise`, or by hand.

python -m ballast.cell PLAN CELL [--root ROOT] [--results RESULTS]
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.costs import Phases, since_start
from ballast.errors import BallastError, Damaged, DataError, Diverged
from ballast.faults import fault_of
from ballast.files import remove_parts, set_aside, sha256_file, write_text
from ballast.layout import Layout
from ballast.locks import held, inherited
from ballast.outcome import (
    ADAPTER,
    BROKEN,
    OUT_OF_MEMORY,
    RECORD,
    RECORDED,
    adapters_of,
    blank_record,
    cell_folder,
    failed_record,
    ready_base,
    split_of,
    write_record,
)
from ballast.plan import row_of
from ballast.records import not_finite, read_path

CHECKPOINT, CURVE = "checkpoint.{key}.safetensors", "curve.csv"
PHASES = ("start", "load", "attach", "train", "merge", "evaluate", "drift")


def run_cell(row: dict[str, Any], layout: Layout, report: Any) -> dict[str, Any]:
    """Train (or edit parents), store, score; returns the record, status ok.

    A stored adapter whose train key is this cell's is scored again, not trained again.
    Raises Diverged, DataError, and whatever the method raises.
    """
    phases = Phases()
    spec = json.loads(row["spec"])
    folder, ready = cell_folder(row, layout), ready_base(row, layout)
    work = Work(row, spec, layout, folder, ready, phases, report)
    try:
        stored = work.stored()
        if stored is None:
            stored = work.train() if not row["posthoc"] else work.edit()
        return work.score(stored)
    finally:
        if work.untouched is not None:
            work.untouched.unlink(missing_ok=True)


class Work:
    """One cell in this process; the steps share what they loaded."""

    def __init__(
        self,
        row: dict[str, Any],
        spec: dict[str, Any],
        layout: Layout,
        folder: Path,
        ready: dict[str, Any],
        phases: Phases,
        report: Any,
    ) -> None:
        self.row, self.spec, self.layout, self.folder = row, spec, layout, folder
        self.ready, self.phases, self.report = ready, phases, report
        self.base: Any = None
        self.tuner: Any = None
        self.untouched: Path | None = None

    @property
    def final(self) -> bool:
        """Whether the cell is one of results, scored on test items alone, not one of `tune`."""
        return {split_of(self.spec, name) for name in self.spec["tasks"]} == {"test"}

    def stored(self) -> dict[str, Any] | None:
        """What an earlier run of this very cell stored when it had trained, or None."""
        from ballast.tensorfile import read_tensors

        path = self.folder / ADAPTER
        if not path.exists():
            return None
        try:
            tensors, about = read_tensors(path)
        except Damaged as error:
            self.report.note(f"{error}; set aside, training again")
            set_aside(path)
            return None
        if about["train_key"] != self.row["train_key"]:
            return None
        # An earlier version wrote none; its parents are taken to be the same.
        if "parents" in about and about["parents"] != adapters_of(self.spec, self.layout):
            self.report.note("made of other weights of its parents; made again")
            return None
        self.report.note("trained before; scoring only")
        with self.phases.phase("load"):
            self.load()
        self._look_at_base()
        if self.row["posthoc"]:
            self.put(tensors)
        else:
            self.tuner = make_tuner(self.base, self.spec, self.layout)
            self.tuner.restore(tensors)
        return about

    def train(self) -> dict[str, Any]:
        """Train from the base or the latest checkpoint; stores adapter and curve."""
        from ballast.training import Trainer

        with self.phases.phase("load"):
            self.load()
            examples = self.examples()
        self._look_at_base()
        with self.phases.phase("attach"):
            self.tuner = make_tuner(self.base, self.spec, self.layout)
            trainer = Trainer(
                self.tuner,
                examples,
                self.spec["training"],
                self.spec["seed"],
                # Named by the key: a method edited since does not continue its older self.
                self.folder / CHECKPOINT.format(key=self.row["train_key"]),
                self.report.step,
            )
            trainer.prepare()
        first_step = since_start() - self.phases.seconds.get("drift", 0.0)
        with self.phases.phase("train"):
            outcome = trainer.run()
        # The steps alone, those before a kill included; checkpoints and restarts are not training.
        self.phases.seconds["train"] = sum(outcome.step_seconds)
        about = {
            "train_key": self.row["train_key"],
            "seconds": dict(self.phases.seconds),
            "memory_mb": dict(self.phases.memory_mb),
            "first_step_seconds": first_step,
            "step_ms": 1000 * statistics.median(outcome.step_seconds),
            "tokens": outcome.tokens,
            "resumed_from": outcome.resumed_from,
            "trainable_parameters": self.tuner.trained_count(),
            "head_parameters": self.tuner.head_count() if "classes" in self.spec else None,
            "scale": _scale(self.tuner.ctx),
            "report": {
                name: float(value)
                for name, value in (self.tuner.ctx.resolved | self.tuner.report()).items()
            },
            "curve": {
                "steps": len(outcome.losses),
                "first_loss": outcome.losses[0],
                "last_loss": statistics.fmean(outcome.losses[-10:]),
            },
        }
        lines = [f"{step},{loss:.6g}" for step, loss in enumerate(outcome.losses, 1)]
        write_text(self.folder / CURVE, "\n".join(["step,loss", *lines]) + "\n")
        about["curve_sha256"] = sha256_file(self.folder / CURVE)
        return self._store(self.tuner.tensors(), about)

    def edit(self) -> dict[str, Any]:
        """Run a post-hoc method on the finished parents; nothing is trained."""
        from ballast.context import PostHoc
        from ballast.encoders import head_part
        from ballast.tuner import WEIGHT, load_method, moment

        parents = [self._parent(name) for name in self.spec["parents"]]
        # A head belongs to its target: the method does not see it, the own parent's is kept.
        heads = {target: head_part(weights) for weights, target in parents}
        parents = [({k: v for k, v in w.items() if k not in heads[t]}, t) for w, t in parents]
        with self.phases.phase("load"):
            self.load()
        self._look_at_base()
        method = load_method(self.layout.methods / f"{self.spec['method']}.py")
        changed = {key for weights, _ in parents for key in weights}
        state = self.base.model.state_dict()
        fresh = head_part(state)
        state = {k: v for k, v in state.items() if k not in fresh}
        context = PostHoc(
            # Copies of what `load` may write over; the rest is the model's own.
            base={k: v.cpu().clone() if k in changed else v.cpu() for k, v in state.items()},
            tuned=[weights for weights, _ in parents],
            hyper=_hyper(method, self.spec),
            generator=_generator(self.spec["seed"]),
            own=[target for _, target in parents].index(self.spec["target"]),
            model=self.base.model,
            anatomy=self.base.anatomy,
            examples=lambda parent, count: self._examples_of(parents[parent][1], count, heads),
        )
        with self.phases.phase("attach"):
            with moment("post_hoc"):
                weights = method.post_hoc(context)
            context.load(None)
        own = self.spec["target"]
        if heads[own]:
            self._give_head(own, heads[own])
        weights |= heads[own]
        tensors = {WEIGHT + name: value for name, value in weights.items()}
        about = {
            "train_key": self.row["train_key"],
            "parents": adapters_of(self.spec, self.layout),
            "seconds": dict(self.phases.seconds),
            "memory_mb": dict(self.phases.memory_mb),
            "trainable_parameters": None,
            "report": {},
        }
        self.put(tensors)
        return self._store(tensors, about)

    def score(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Merge where the method merges, score every task, and write up the record."""
        from ballast.comparison import Comparison
        from ballast.evaluation import score_task, write_items
        from ballast.harness import language_model
        from ballast.tasks import read_tasks
        from ballast.template import template_for

        scored = "adapted"
        if self.spec["merges"]:
            scored = "merged"
            if self.tuner is not None:
                with self.phases.phase("merge"):
                    self.tuner.merge()
        elif self.tuner is not None:
            self.tuner.lower()
        tasks = read_tasks(self.layout.tasks)
        encoder = self.base.anatomy.kind == "encoder"
        delimiter = "" if encoder else template_for(self.base.tokenizer, self.spec).delimiter
        record = blank_record(self.row, self.ready, tasks)
        compared = {}
        with self.phases.phase("evaluate"):
            self.base.model.eval()
            lm = language_model(self.base, self.spec["evaluation"]["batch_size"])
            for name in self.spec["tasks"]:
                folder = Path(self.ready["tasks"][name]["folder"])
                split = split_of(self.spec, name)
                scores = score_task(lm, tasks[name], folder, delimiter, split)
                path = self.folder / "samples" / f"{name}.parquet"
                write_items(scores, path)
                bad = not_finite(scores.summary, "")
                if bad:
                    # A retry trains again: to score it once more would say the same.
                    (self.folder / ADAPTER).unlink(missing_ok=True)
                    raise Diverged(
                        f"{bad} of the tuned model on {name} is no finite number: its outputs "
                        "overflow"
                    )
                record["scores"][name] = scores.summary
                record["files"][f"samples/{name}.parquet"] = sha256_file(path)
                compared |= {name: scores} if self.final else {}
                self.report.note(f"{name}: {scores.summary['value']:.1f}")
        comparison = Comparison(self.base.tokenizer)
        for name, scores in compared.items():
            comparison.add(tasks[name], scores, self.ready["tasks"][name])
        record["churn"] = comparison.churn
        record["files"] |= comparison.store(self.folder)
        record["drift"] = self._drift()
        self._check_base()
        for path in self.folder.glob(CHECKPOINT.format(key="*")):
            path.unlink()
        return self._complete(record, stored, scored)

    def _complete(
        self, record: dict[str, Any], stored: dict[str, Any], scored: str
    ) -> dict[str, Any]:
        from ballast.provenance import provenance

        seconds = self.phases.seconds | {
            k: v for k, v in stored["seconds"].items() if k in ("attach", "train", "load", "start")
        }
        seconds = dict.fromkeys(PHASES, 0.0) | seconds
        seconds["total"] = sum(seconds.values())
        memory = stored["memory_mb"] | self.phases.memory_mb
        record |= {"status": "ok", "scored": scored, "report": stored["report"]}
        record["curve"] = stored.get("curve")
        record["settings"]["scale"] = stored.get("scale")
        record["files"][ADAPTER] = stored["digest"]
        if (self.folder / CURVE).is_file():
            record["files"][CURVE] = stored.get("curve_sha256", sha256_file(self.folder / CURVE))
        record["costs"] = {
            "trainable_parameters": stored["trainable_parameters"],
            "total_parameters": stored["total_parameters"],
            **(
                {"head_parameters": stored.get("head_parameters")} if "classes" in self.spec else {}
            ),
            "adapter_bytes": (self.folder / ADAPTER).stat().st_size,
            "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "first_step_seconds": stored.get("first_step_seconds"),
            "step_ms": stored.get("step_ms"),
            "memory_mb": {
                k: round(memory[k], 1) if k in memory else None for k in ("train", "evaluate")
            },
            "tokens": stored.get("tokens"),
        }
        record["provenance"] |= provenance(self.layout.root, str(self.base.model.device))
        record["provenance"]["resumed_from"] = stored.get("resumed_from")
        record["provenance"]["parents"] = stored.get("parents", {})
        return record

    def _look_at_base(self) -> None:
        """Note what the drift is measured against, while the base is untouched.

        It waits in a file: in memory it would count as training's.
        """
        from ballast.drift import measured as drift
        from ballast.template import template_for

        if not (self.final and self.spec["evaluation"].get("drift", True)):
            return
        with self.phases.phase("drift"):
            encoder = self.base.anatomy.kind == "encoder"
            delimiter = "" if encoder else template_for(self.base.tokenizer, self.spec).delimiter
            entries = self.spec["tasks"]
            folders = {name: Path(self.ready["tasks"][name]["folder"]) for name in entries}
            texts = drift.texts(self.base, folders, entries, delimiter=delimiter)
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".untouched.", suffix=".part")
            os.close(handle)
            self.untouched = Path(name)
            drift.write_reference(drift.reference(self.base, texts), self.untouched)

    def _drift(self) -> dict[str, float | None]:
        from ballast.decompositions import Decompositions
        from ballast.drift import measured as drift

        if self.untouched is None:
            return {}
        path, self.untouched = self.untouched, None
        cache = Decompositions(self.layout.decompositions(self.spec["base"], self.row["base_key"]))
        with self.phases.phase("drift"):
            found = drift.read_reference(path)
            path.unlink()
            return drift.drift_of(found, self.base, Path(self.ready["model"]), cache=cache)

    def _store(self, tensors: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
        from ballast.tensorfile import tensors_digest, write_tensors

        bad = [name for name, value in tensors.items() if not _finite(value)]
        if bad:
            raise Diverged(
                f"after the last step {len(bad)} of {len(tensors)} stored tensors hold NaN or "
                f"infinite numbers, {bad[0]} the first; a smaller learning rate may help"
            )
        about["total_parameters"] = sum(p.numel() for p in self.base.model.parameters())
        about |= {"digest": tensors_digest(tensors), "spec": self.row["spec"]}
        write_tensors(self.folder / ADAPTER, tensors, about)
        return about

    def load(self) -> None:
        """The untouched base, with a fresh head where the cell has one, as `base`."""
        import torch

        from ballast.models import use_stored_features

        training = self.spec["training"]
        torch.set_num_threads(training["threads"])
        self._check_base()
        self.base = load_for(self.spec, Path(self.ready["model"]), training["device"])
        if self.base.multimodal:
            use_stored_features(self.base)

    def _check_base(self) -> None:
        """Raise DataError if the files of the base are not those that were made ready.

        Files are read when the base is loaded, and again at the end if they have changed since.
        """
        from ballast.bases.build import check_unchanged

        check_unchanged(self.ready, set_damaged_aside=True)

    def examples(self) -> Any:
        """Training examples of the cell's target, of all its tasks if it is a mixture."""
        from ballast.training import joined

        tasks = self.spec.get("mixture", [self.spec["target"]])
        return joined([self._examples_of_task(task) for task in tasks])

    def _examples_of(
        self, target: str, count: int, heads: dict[str, dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Single training examples of another target, as a post-hoc method measures on them.

        An encoder carries that target's head while it is asked.
        """
        from ballast.training import single_examples

        if heads[target]:
            self._give_head(target, heads[target])
        yield from single_examples(
            self._examples_of_task(target), count, self.spec["seed"], self.base.model.device
        )

    def _give_head(self, target: str, tensors: dict[str, Any]) -> None:
        """Put the trained head of a target in the place of the encoder's."""
        from ballast.encoders import HEAD

        own = target == self.spec["target"]
        classes = self.spec["classes"] if own else [[target, len(tensors[f"{HEAD}.out.bias"])]]
        _add_head(self.base, self.spec | {"classes": classes})
        self.base.model.load_state_dict(tensors, strict=False)

    def _examples_of_task(self, task: str) -> Any:
        from ballast.data import load_split
        from ballast.training import Examples

        table, features = load_split(Path(self.ready["tasks"][task]["folder"]), "train")
        columns = table.with_format("numpy")[:]
        classes, types = None, columns.get("token_type_ids")
        if "label" in columns:
            # Where a head has the classes of several tasks, a task's begin at its place there.
            head = self.base.model.class_head
            first = head.places(task).start if task in head.classes else 0
            classes = (columns["label"] + first).tolist()
        return Examples(
            input_ids=list(columns["input_ids"]),
            prompt_lengths=columns["prompt_length"].tolist(),
            pad=self.base.tokenizer.pad_token_id,
            classes=classes,
            token_types=list(types) if types is not None else None,
            images=columns["image"].tolist() if features is not None else None,
            features=features.to(self.base.model.dtype) if features is not None else None,
            tasks=[task] * len(table),
        )

    def put(self, tensors: dict[str, Any]) -> None:
        """Write plain weights into the model."""
        from ballast.tuner import WEIGHT

        state = self.base.model.state_dict()
        for name, value in tensors.items():
            state[name.removeprefix(WEIGHT)].copy_(value)

    def _parent(self, name: str) -> tuple[dict[str, Any], str]:
        """Merged weights of a finished parent that differ from the base's, and its target."""
        from ballast.tensorfile import read_tensors

        folder = self.layout.cell(self.spec["suite"], name)
        record = read_path(folder / RECORD)
        if record["status"] != "ok":
            raise BallastError(f"parent {name} failed: {record['failure']['reason']}")
        try:
            tensors, about = read_tensors(folder / ADAPTER, record["files"][ADAPTER])
        except Damaged as error:
            set_aside(folder / ADAPTER)
            set_aside(folder / RECORD)
            raise Damaged(
                f"{error}; it and its record are set aside as *.damaged, and the next run trains "
                f"the parent {name} again"
            ) from None
        spec = json.loads(about["spec"])
        weights = merged_weights(Path(self.ready["model"]), spec, self.layout, tensors)
        return weights, spec["target"]


def make_tuner(base: Any, spec: dict[str, Any], layout: Layout) -> Any:
    """The method of a spec at work on a loaded base."""
    from ballast.anatomy import targets_of
    from ballast.budget import resolve
    from ballast.context import Context
    from ballast.declare import read_method
    from ballast.decompositions import Decompositions
    from ballast.encoders import HeadTuner
    from ballast.template import template_for
    from ballast.tuner import Tuner, load_method

    method = load_method(layout.methods / f"{spec['method']}.py")
    marker = () if base.anatomy.encoder else template_for(base.tokenizer, spec).marker()
    context = Context(
        model=base.model,
        anatomy=base.anatomy,
        hyper=_hyper(method, spec),
        rank=spec["rank"],
        targets=targets_of(base.model, spec["modules"], spec["connector"]),
        generator=_generator(spec["seed"]),
        cache=Decompositions(layout.decompositions(spec["base"], spec["base_key"])),
        total_steps=spec["training"]["steps"],
        learning_rate=spec["learning_rate"],
        connector=spec["connector"],
        tasks=tuple(spec.get("mixture", [spec["target"]])),
        response_marker=marker,
    )
    if "budget" in spec:
        declaration = read_method(layout.methods / f"{spec['method']}.py").declaration
        context.resolved = resolve(spec["budget"], method, declaration, context)
    if "classes" in spec:
        return HeadTuner(method, context, spec["training"]["head_learning_rate"])
    return Tuner(method, context)


def load_for(spec: dict[str, Any], model: Path, device: str = "cpu") -> Any:
    """The base of a cell, with a fresh head where its target is a classification."""
    from ballast.models import load_base

    base = load_base(model, spec["training"]["precision"], device)
    _add_head(base, spec)
    return base


def _add_head(base: Any, spec: dict[str, Any]) -> None:
    """A fresh head for the classes of a target, if it is a classification."""
    from ballast.encoders import add_head

    if "classes" in spec:
        add_head(base.model, dict(spec["classes"]), spec["seed"])


def merged_weights(
    model: Path, spec: dict[str, Any], layout: Layout, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Plain weights, by name, in which a trained cell differs from its base.

    Raises BallastError for a method that does not merge.
    """
    import torch

    if not spec["merges"]:
        raise BallastError(f"{spec['method']} does not merge into plain weights")
    base = load_for(spec, model)
    before = {k: v.detach().clone() for k, v in base.model.state_dict().items()}
    tuner = make_tuner(base, spec, layout)
    tuner.restore(tensors)
    tuner.merge()
    after = base.model.state_dict()
    return {k: v.detach().cpu() for k, v in after.items() if not torch.equal(v, before[k])}


def _finite(tensor: Any) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _hyper(method: Any, spec: dict[str, Any]) -> Any:
    hyper = getattr(method, "Hyper", None)
    return hyper(**spec["hyper"]) if hyper else None


def _generator(seed: int) -> Any:
    import torch

    from ballast.training import derived_seed

    return torch.Generator().manual_seed(derived_seed(seed, "adapter"))


def _scale(ctx: Any) -> float | None:
    """The scale that took effect, where all adapters share one."""
    scales = {float(a.scale) for _, a in ctx.adapters() if hasattr(a, "scale")}
    return scales.pop() if len(scales) == 1 else None


def main(arguments: list[str] | None = None) -> int:
    """Run one cell and write its record; the exit code says what happened (see `outcome`)."""
    from ballast.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m ballast.cell", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("cell")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    layout = Layout(options.root or Layout.here().root, options.results)
    row = row_of(options.plan, options.cell)
    progress, folder = Progress(row["id"]), cell_folder(row, layout)
    try:
        with nullcontext() if inherited() else held(folder, row["id"]):
            remove_parts(folder)
            remove_parts(layout.decompositions(row["base"], row["base_key"]))
            return _recorded(row, layout, progress)
    except (BallastError, OSError) as error:
        progress.fault(fault_of(error, layout.results) or str(error))
        return BROKEN


def _recorded(row: dict[str, Any], layout: Layout, progress: Any) -> int:
    """Run a cell and write its record, of success or of failure; returns the exit code.

    Raises BallastError or OSError where what went wrong is not the cell's.
    """
    try:
        record = run_cell(row, layout, progress)
    except Diverged as error:
        record = failed_record(row, layout, "diverged", str(error), 1)
    except DataError as error:
        progress.fault(str(error))
        return BROKEN
    except (Exception, SystemExit) as error:
        if _out_of_memory(error):
            progress.note(f"out of memory: {error}")
            return OUT_OF_MEMORY
        fault = fault_of(error, layout.results)
        if fault is not None:
            progress.fault(fault)
            return BROKEN
        progress.note(traceback.format_exc())
        record = failed_record(row, layout, "raised", _reason(error), 1)
    write_record(row, layout, record)
    return RECORDED


def _reason(error: BaseException) -> str:
    """What was raised and, as notes say, at which of a method's moments."""
    moments = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    # Ballast's own messages say what they are about.
    kind = "" if isinstance(error, BallastError) else f"{type(error).__name__}: "
    return f"{moments}{kind}{error}"


def _out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


if __name__ == "__main__":
    sys.exit(main())
