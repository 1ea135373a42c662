"""Loads a checkpoint into a task's model: plans by names and shapes, then reads the tensors."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from blipfast.checkpoints.architecture import as_config, with_image_size
from blipfast.checkpoints.mapping import Tensors
from blipfast.checkpoints.rules import TASKS, Transfer, targets_of, transfer
from blipfast.checkpoints.source import Source, open_source
from blipfast.errors import CheckpointError, ConfigError
from blipfast.models.blip import Blip
from blipfast.models.config import BlipConfig
from blipfast.models.vit import interpolate_pos_embed

_LISTED = 12  # lines of one kind in an error; the rest is counted


@dataclass
class LoadReport:
    """What became of every tensor. Names are blipfast's; a rule is given in words.

    loaded: tensors read as they are. interpolated: positions brought to another image size.
    unused: of the checkpoint, by rule. fresh: of the model, left at random, by rule.
    copied: of the model, taken from another tensor of the checkpoint, by rule.
    """

    source: str
    source_task: str
    task: str
    loaded: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    unused: dict[str, list[str]] = field(default_factory=dict)
    fresh: dict[str, list[str]] = field(default_factory=dict)
    copied: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.source_task}) -> {self.task}: {len(self.loaded)} loaded"]
        if self.interpolated:
            lines.append(f"  interpolated to another image size: {', '.join(self.interpolated)}")
        kinds = (("copied", self.copied), ("fresh", self.fresh), ("unused", self.unused))
        for word, rules in kinds:
            lines += [f"  {word}: {rule} ({len(names)})" for rule, names in rules.items()]
        return "\n".join(lines)


@dataclass
class Plan:
    """For each tensor of the model the name of the tensor it is read from, and the report."""

    reads: dict[str, str]
    equal: list[tuple[str, str]]  # names of the checkpoint that must hold the same values
    report: LoadReport

    @property
    def complete(self) -> bool:
        """The checkpoint fills the whole model; the temperature is in the configuration."""
        return all(names == ["temp"] for names in self.report.fresh.values())


@overload
def load_model(
    source: Any,
    task: str | None = ...,
    *,
    image_size: int | None = ...,
    config: Any = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str = ...,
    allow_fresh: bool = ...,
    return_report: Literal[False] = ...,
    **model_options: Any,
) -> Any: ...


@overload
def load_model(
    source: Any, task: str | None = ..., *, return_report: Literal[True], **kwargs: Any
) -> tuple[Any, LoadReport]: ...


def load_model(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    task: str | None = None,
    *,
    image_size: int | None = None,
    config: BlipConfig | dict[str, Any] | str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_fresh: bool = False,
    return_report: bool = False,
    **model_options: Any,
) -> Any:
    """A task's model with a checkpoint's weights, in evaluation mode.

    source: one of the original's `.pth` files (or its state dict), a transformers BLIP directory,
    or a directory written by `save_model`.
    task: "pretrain", "caption", "retrieval", "vqa", "nlvr", "visdial" or "features"; by default the
    checkpoint's own.
    image_size: pixels; positions are interpolated (section 4.2).
    config: a `BlipConfig`, its dict or a preset's name, where the checkpoint does not tell.
    dtype: of floating tensors, by default the checkpoint's.
    allow_fresh: start parts that do not fit at random, where the table of rules says that this can
    be meant. return_report: also return a `LoadReport`.
    model_options: of the task's class, e.g. `queue_size`, `train_state`.

    Every tensor is accounted for. Raises CheckpointError listing what is missing, left over or
    misshapen, and ConfigError for an unknown task or option.
    """
    opened = open_source(source, None if config is None else as_config(config))
    task = task or opened.task
    if task not in TASKS:
        raise ConfigError(f"no task {task!r}; there are {', '.join(TASKS)}")
    options = _options(opened, task, model_options)
    model_config = with_image_size(opened.config, image_size)
    with torch.device("meta"):
        skeleton = build(task, model_config, options)
    plan = plan_transfer(opened, skeleton, task, allow_fresh=allow_fresh)
    # Drawing weights that are then overwritten would take longer than all the rest.
    model = materialise(skeleton) if plan.complete else build(task, model_config, options)
    model = model.to(dtype=dtype or _common_dtype(plan, opened.tensors))
    read_into(plan, opened.tensors, model)
    model = model.to(device=device).eval()
    return (model, plan.report) if return_report else model


def build(task: str, config: BlipConfig, options: Mapping[str, Any]) -> Blip:
    """A task's model with random weights. Raises ConfigError for an option it does not have."""
    try:
        return TASKS[task](config, **options)
    except TypeError as error:
        raise ConfigError(f"{TASKS[task].__name__} cannot be built: {error}") from error


def materialise(model: Blip) -> Blip:
    """Gives a model on the meta device memory on the CPU, tied tensors still tied.

    Nothing but the temperature has a value then. Buffers outside the state would never get one, so
    a model with such a buffer is a CheckpointError.
    """
    if hidden := [type(m).__name__ for m in model.modules() if m._non_persistent_buffers_set]:
        raise CheckpointError(f"cannot materialise the buffers outside the state of {hidden}")
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensor is kept, so that its id is its own
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    memory: Tensor = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        memory = nn.Parameter(memory, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (tensor, memory)
                tensors[name] = made[id(tensor)][1]  # type: ignore[assignment]
    if hasattr(model, "temp"):
        nn.init.constant_(model.temp, model.config.temperature)
    return model


def _options(source: Source, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The model's options: those it was saved with, unless others are given."""
    options = {**(source.options if source.task == task else {}), **given}
    queue = source.tensors.shapes.get("queue.image_queue")
    keeps_queue = task == "pretrain" or (task == "retrieval" and options.get("train_state"))
    if queue is not None and keeps_queue:
        options.setdefault("queue_size", queue[0])
    return options


def plan_transfer(
    source: Source, model: nn.Module, task: str, *, allow_fresh: bool = False
) -> Plan:
    """`plan_load` by the rules for a checkpoint of the source's task and a model for `task`.

    Raises CheckpointError also when no such transfer is meant.
    """
    rules = transfer(source.task, task)
    report = LoadReport(source.where, source.task, task)
    if rules is not None:
        return plan_load(source.tensors, model, rules, report, allow_fresh=allow_fresh)
    planner = _Planner(source.tensors, Transfer(), report)
    planner.place_all(model)
    loadable = ", ".join(targets_of(source.task))
    raise CheckpointError(planner.complaint(f"; it can be loaded as: {loadable}"))


def plan_load(
    tensors: Tensors,
    model: nn.Module,
    rules: Transfer,
    report: LoadReport,
    *,
    allow_fresh: bool = False,
) -> Plan:
    """Decides by names and shapes alone what goes where; the model may be on the meta device.

    Raises CheckpointError listing what is missing, left over or misshapen.
    """
    planner = _Planner(tensors, rules, report, allow_fresh)
    planner.place_all(model)
    if planner.missing or planner.misshapen or planner.left_over:
        raise CheckpointError(planner.complaint())
    return Plan(planner.reads, planner.equal, report)


def tie_groups(model: nn.Module) -> list[tuple[list[str], tuple[int, ...]]]:
    """The names of each tensor of the state, and its shape; tied tensors have several names."""
    groups: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return [(names, tuple(state[names[0]].shape)) for names in groups.values()]


class _Planner:
    def __init__(
        self, tensors: Tensors, rules: Transfer, report: LoadReport, allow_fresh: bool = False
    ) -> None:
        self.shapes, self.rules, self.report = tensors.shapes, rules, report
        self.allow_fresh = allow_fresh
        self.reads: dict[str, str] = {}
        self.equal: list[tuple[str, str]] = []
        self.used: set[str] = set()
        self.missing: list[tuple[str, tuple[int, ...]]] = []
        self.misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.left_over: list[str] = []
        self.restarted: set[str] = set()  # groups that start afresh as a whole

    def place_all(self, model: nn.Module) -> None:
        for names, shape in tie_groups(model):
            self._place(names, shape)
        self._account_for_rest()

    def _place(self, names: list[str], shape: tuple[int, ...]) -> None:
        """Finds what one tensor of the model, with all its names, is read from."""
        found = [name for name in names if name in self.shapes]
        self.used.update(found)
        if found:
            self._read(names[0], found[0], shape)
            self.equal += [(found[0], other) for other in found[1:]]
            return
        for copy in self.rules.copies:
            for name in names:
                match = re.fullmatch(copy.target, name)
                if match is None:
                    continue
                origin = match.expand(copy.source)
                if origin in self.shapes:
                    self.used.add(origin)
                    self._read(names[0], origin, shape, copy.rule)
                    return
        group = self.rules.matching(self.rules.fresh, names[0])
        if group is not None:
            self._fresh(group, names[0])
        else:
            self.missing.append((names[0], shape))

    def _read(self, name: str, origin: str, shape: tuple[int, ...], rule: str = "") -> None:
        has = self.shapes[origin]
        resized = name.endswith("pos_embed") and has[::2] == shape[::2]
        if has != shape and not resized:
            self._misfit(name, has, shape)
            return
        self.reads[name] = origin
        if rule:
            self.report.copied.setdefault(rule, []).append(name)
        elif has != shape:
            self.report.interpolated.append(name)
        else:
            self.report.loaded.append(name)

    def _misfit(self, name: str, has: tuple[int, ...], shape: tuple[int, ...]) -> None:
        group = self.rules.matching(self.rules.fresh_if_misshapen, name)
        if group is not None:
            self.restarted.add(group)
            self._fresh(f"{group} (of another size)", name)
            return
        group = self.rules.matching(self.rules.fresh_on_request, name)
        if group is not None and self.allow_fresh:
            self._fresh(f"{group} (of another width, allow_fresh)", name)
            return
        self.misshapen.append((name, has, shape))

    def _fresh(self, rule: str, name: str) -> None:
        self.report.fresh.setdefault(rule, []).append(name)

    def _account_for_rest(self) -> None:
        """Finds the rule for each tensor that nothing was read from."""
        for group in self.restarted:  # a pointer into a queue of another size means nothing
            for restarted in [n for n in self.reads if self.rules.matching([group], n)]:
                del self.reads[restarted]
                self.report.loaded.remove(restarted)
                self._fresh(f"{group} (of another size)", restarted)
        for name in self.shapes:
            if name in self.used:
                continue
            rule = self.rules.matching(self.rules.unused, name)
            if rule is None:
                self.left_over.append(name)
            else:
                self.report.unused.setdefault(rule, []).append(name)

    def complaint(self, advice: str = "") -> str:
        """What is wrong, grouped so that it can be read."""
        report = self.report
        lines = [
            f"{report.source} ({report.source_task}) does not fit the model ({report.task}){advice}"
        ]
        left = [(name, self.shapes[name]) for name in self.left_over]
        lines += _listing("missing", ((n, f"{list(s)}") for n, s in self.missing))
        lines += _listing("left over", ((n, f"{list(s)}") for n, s in left))
        lines += _listing(
            "misshapen",
            ((n, f"{list(has)} in the checkpoint, {list(s)} here") for n, has, s in self.misshapen),
        )
        on_request = self.rules.matching(
            self.rules.fresh_on_request, self.misshapen[0][0] if self.misshapen else ""
        )
        if on_request is not None:
            lines.append(f"allow_fresh=True starts the {on_request} at random")
        return "\n".join(lines)


def _listing(what: str, items: Iterable[tuple[str, str]]) -> list[str]:
    """Lines for names and their shapes, the same module of several layers on one line."""
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, shape in items:
        groups[re.sub(r"\.\d+(?=\.)", ".*", name), shape] += 1
    if not groups:
        return []
    lines = [f"  {what} ({sum(groups.values())} tensors):"]
    for (name, shape), number in list(groups.items())[:_LISTED]:
        lines.append(f"    {name} {shape}" + (f", {number} of them" if number > 1 else ""))
    if len(groups) > _LISTED:
        lines.append(f"    and {len(groups) - _LISTED} more kinds")
    return lines


def read_into(plan: Plan, tensors: Tensors, model: nn.Module) -> None:
    """Reads the planned tensors into the model."""
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, origin in plan.reads.items():
            tensor, target = tensors.read(origin), state[name]
            if tensor.shape != target.shape:
                tensor = interpolate_pos_embed(tensor.float(), target.shape[1])
            target.copy_(tensor)
    for name, other in plan.equal:
        first, second = tensors.read(name), tensors.read(other)
        if first.data_ptr() != second.data_ptr() and not torch.equal(first, second):
            raise CheckpointError(
                f"{plan.report.source}: {name} and {other} are one tensor in this model, but two "
                "with different values in the checkpoint: load it with a config whose `sharing` "
                "fits the weights"
            )


def _common_dtype(plan: Plan, tensors: Tensors) -> torch.dtype:
    """The one floating dtype of what was read; float32 where it is mixed."""
    dtypes = {tensors.dtypes[origin] for origin in plan.reads.values()}
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return floating.pop() if len(floating) == 1 else torch.float32
