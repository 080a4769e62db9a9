"""A forward pass over a whole data set that brings each part of the model in once.

All batches go through the first part, then all through the second, and so on. Experts that do not fit together are
brought in some at a time, and their contributions to a token added up. Whoever wants to see whole MoE blocks is told
what each is given and puts out, and when all batches have passed it.

Axes: T tokens of a batch, padding included, K experts per token, H hidden size, N (token, expert) pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from moeprune.checkpoint.loading import Checkpoint, default_device, default_dtype
from moeprune.errors import InputError
from moeprune.fitting import is_out_of_memory
from moeprune.moe_blocks import block_of
from moeprune.statistics.observer import ExpertsCall, intercept
from moeprune.statistics.passes import Batch, Watch
from moeprune.streaming.holding import Held, Noting, NotInMemoryError
from moeprune.streaming.lanes import Lane, stop_at
from moeprune.streaming.paging import PagedModel
from moeprune.streaming.room import UNLIMITED, Room, bytes_of_pass, return_freed_memory, share_out

FEWEST_EXPERTS = 3  # at once: in some families a model of one expert is not a Mixture-of-Experts
USUAL_TOP_K = 8
_SHARE_OF_A_PASS = 1 / 6  # of the limit


_RunAndShow = Callable[[int, slice, ExpertsCall], torch.Tensor]


@dataclass(frozen=True)
class _Part:
    """A door: the pass is about to enter this part."""

    name: str


@dataclass(frozen=True)
class _Experts:
    """A door: the pass waits for the output of this layer's experts."""

    layer: str
    call: ExpertsCall = field(compare=False)


@dataclass(frozen=True)
class _Entered:
    """A door: the pass has entered this layer's MoE block."""

    layer: str
    args: tuple[Any, ...] = field(compare=False)
    kwargs: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class _Left:
    """A door: the pass is about to leave this layer's MoE block."""

    layer: str
    output: Any = field(compare=False)


class BlockWatcher(Protocol):
    """Whoever wants to see MoE blocks.

    Attributes:
        layers: names of the experts modules whose blocks it wants to see. The passes end after the last of them.
    """

    @property
    def layers(self) -> Sequence[str]: ...

    def given(self, layer: str, number: int, rows: slice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the forward of the layer's block is given for these rows of a batch. The tensors are the pass's."""

    def put_out(self, layer: str, number: int, rows: slice, output: Any) -> None:
        """What it returns for them, likewise."""

    def passed(self, layer: str) -> None:
        """All batches have passed the layer's block. Autograd works here, and `StreamedPass.experts`."""


@dataclass
class _Passing:
    """One batch on its way.

    Attributes:
        lane: its forward pass.
        held: what that holds.
        number, rows: which batch it is a part of, and which part.
        ahead: layers that it must come to yet before it may end.
        output_TH: what the experts that were brought in up to now have put out.
    """

    lane: Lane[_Part | _Experts | _Entered | _Left]
    held: Held
    number: int
    rows: slice
    ahead: set[str]
    output_TH: torch.Tensor | None = None


class StreamedPass:
    """Runs batches through a model that need not fit into memory.

    Attributes:
        room: what may be in memory at once, as the pass that began last has it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        memory_limit: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        scratch: Path | None = None,
        experts_bytes: int | None = None,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            memory_limit: bytes that this process may take in all. Without one, only a layer is in memory at a time.
            dtype, device: by default those that `Checkpoint.load` takes.
            scratch: directory for activations that do not fit; by default the system's for temporary files.
            experts_bytes: `room.experts` of a pass that is to be repeated bit for bit.
        """
        self._device = device or default_device()
        self._paged = PagedModel(checkpoint, dtype or default_dtype(self._device), self._device)
        self._limit = memory_limit
        self._scratch = scratch
        self._experts_bytes = experts_bytes
        self.room = UNLIMITED
        self.layers = self._paged.layers

    def __call__(
        self, batches: Sequence[Batch], watch: Watch, on_progress: Callable[[int, int], None], *, inside: bool = False
    ) -> None:
        """See `ForwardPass`.

        Raises:
            InputError: the limit is too small, memory ran out, or the model's forward pass uses weights without
                entering their part.
        """
        self._pass(batches, partial(_run_and_show, watch, inside), None, on_progress)

    def blocks(self, batches: Sequence[Batch], watcher: BlockWatcher) -> None:
        """Run batches through the model for someone who wants to see its MoE blocks.

        Raises:
            InputError: as above.
        """
        self._pass(batches, _only_run, watcher, lambda done, total: None)

    @contextmanager
    def experts(self, layer: str) -> Iterator[torch.nn.Module]:
        """All experts of a layer, in memory inside the block, while all passes stand still (`BlockWatcher.passed`)."""
        with self._paged.experts(layer, range(self._paged.experts_of(layer))) as module:
            yield module

    def _pass(
        self,
        batches: Sequence[Batch],
        run_and_show: _RunAndShow,
        watcher: BlockWatcher | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        if self._limit is not None:
            return_freed_memory()
        rows, self.room = self._share_out(batches)
        noting = Noting()
        until = self.layers if watcher is None else watcher.layers
        with (
            tempfile.TemporaryDirectory(prefix="moeprune-", dir=self._scratch) as scratch,
            torch.inference_mode(),
            self._doors(() if watcher is None else watcher.layers),
        ):
            passing = [
                self._start(number, batch, slice(start, min(start + rows, len(batch))), set(until), Path(scratch))
                for number, batch in enumerate(batches)
                for start in range(0, len(batch), rows)
            ]
            try:
                self._run(passing, noting, run_and_show, watcher, on_progress)
            except NotInMemoryError as error:
                raise InputError(
                    f"this model's parts use weights of each other, so that it cannot be streamed ({error}); calibrate "
                    "without --memory-limit, or distill end to end"
                ) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise InputError(
                    "memory ran out while a part of the model was in it; give a smaller --memory-limit or fewer "
                    "--batch-blocks"
                ) from error
            finally:
                for one in passing:
                    one.lane.end()
                self._paged.drop_all()

    def _share_out(self, batches: Sequence[Batch]) -> tuple[int, Room]:
        """How many sequences go through together, and what may be in memory besides."""
        paged, longest = self._paged, max(batch.ids_BS.shape[1] for batch in batches)
        rows = max(map(len, batches))
        if self._limit is None:
            return rows, UNLIMITED
        while rows > 1 and self._bytes_of_pass(rows * longest) > _SHARE_OF_A_PASS * self._limit:
            rows = -(-rows // 2)
        return rows, share_out(
            self._limit,
            largest_part=max(map(paged.bytes_of, paged.parts)),
            fewest_experts=FEWEST_EXPERTS * max(map(paged.bytes_per_expert, paged.layers)),
            all_experts=max(paged.bytes_per_expert(layer) * paged.experts_of(layer) for layer in paged.layers),
            one_pass=self._bytes_of_pass(rows * longest),
            experts=self._experts_bytes,
        )

    def _bytes_of_pass(self, tokens: int) -> int:
        model = self._paged.model
        hidden = model.get_input_embeddings().weight.shape[-1]
        item = torch.finfo(self._paged.dtype).bits // 8
        width = max(map(self._paged.bytes_per_expert, self.layers)) // (3 * hidden * item)
        top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or USUAL_TOP_K
        return bytes_of_pass(tokens, hidden=hidden, width=width, top_k=top_k, item=item)

    @contextmanager
    def _doors(self, watched: Sequence[str]) -> Iterator[None]:
        """Have every pass stop where it enters a part, where it needs experts, and around blocks that are watched."""

        def enter(door: _Part, module: torch.nn.Module, args: tuple) -> None:
            stop_at(door)

        def enter_block(layer: str, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            stop_at(_Entered(layer, args, kwargs))

        def leave_block(layer: str, module: torch.nn.Module, args: tuple, output: Any) -> None:
            stop_at(_Left(layer, output))

        modules = {part: self._paged.model.get_submodule(part) for part in self._paged.parts}
        handles = [module.register_forward_pre_hook(partial(enter, _Part(part))) for part, module in modules.items()]
        for layer in watched:
            block = self._paged.model.get_submodule(block_of(layer))
            handles.append(block.register_forward_pre_hook(partial(enter_block, layer), with_kwargs=True))
            handles.append(block.register_forward_hook(partial(leave_block, layer)))
        try:
            with intercept(self._paged.model, lambda call: stop_at(_Experts(call.layer, call))):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, number: int, batch: Batch, rows: slice, ahead: set[str], scratch: Path) -> _Passing:
        part = batch.rows(rows)
        mask_BS = None if part.mask_BS.all() else part.mask_BS.to(self._device)
        ids_BS = part.ids_BS.to(self._device)
        run = partial(self._paged.model.base_model, input_ids=ids_BS, attention_mask=mask_BS, use_cache=False)
        return _Passing(Lane(run), Held(scratch / f"{number}-{rows.start}"), number, rows, ahead)

    def _run(
        self,
        passing: list[_Passing],
        noting: Noting,
        run_and_show: _RunAndShow,
        watcher: BlockWatcher | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        steps = sum(len(one.ahead) for one in passing)
        for one in passing:
            self._go_on(one, passing, noting)
        while waiting := [one for one in passing if one.lane.door is not None]:
            door = waiting[0].lane.door
            here = [one for one in waiting if one.lane.door == door]
            if isinstance(door, _Experts):
                for one, out_TH in self._run_experts(door.layer, here, passing, run_and_show):
                    if watcher is None:
                        one.ahead.discard(door.layer)
                        on_progress(steps - sum(len(other.ahead) for other in passing), steps)
                    self._go_on_or_end(one, passing, noting, out_TH)
            elif isinstance(door, _Part):
                self._paged.enter(door.name)
                for one in here:
                    self._go_on(one, passing, noting)
            elif watcher is not None and door is not None:
                self._show_block(door, here, passing, watcher)
                for one in here:
                    self._go_on_or_end(one, passing, noting)
            if self._limit is not None:
                return_freed_memory()

    def _show_block(
        self,
        door: _Entered | _Left,
        here: list[_Passing],
        passing: list[_Passing],
        watcher: BlockWatcher,
    ) -> None:
        for one in here:
            one.held.restore()
            match one.lane.door:
                case _Entered(layer, args, kwargs):
                    watcher.given(layer, one.number, one.rows, args, kwargs)
                case _Left(layer, output):
                    watcher.put_out(layer, one.number, one.rows, output)
                    one.ahead.discard(layer)
            self._settle(one, passing)
        if isinstance(door, _Left):
            if self._limit is not None:  # what is done meanwhile has the room for itself
                for one in passing:
                    one.held.spill()
                return_freed_memory()
            with torch.inference_mode(False):
                watcher.passed(door.layer)

    def _go_on_or_end(
        self,
        one: _Passing,
        passing: list[_Passing],
        noting: Noting,
        answer: torch.Tensor | None = None,
    ) -> None:
        if one.ahead:
            self._go_on(one, passing, noting, answer)
        else:
            one.lane.end()
            one.held.forget()

    def _go_on(
        self,
        one: _Passing,
        passing: list[_Passing],
        noting: Noting,
        answer: torch.Tensor | None = None,
    ) -> None:
        """Let one pass run to its next door, then see that what all hold does not take too much memory."""
        one.held.restore()
        with noting.on_behalf_of(one.held):
            one.lane.go_on(answer)
        self._settle(one, passing)

    def _run_experts(
        self, layer: str, here: list[_Passing], passing: list[_Passing], run_and_show: _RunAndShow
    ) -> Iterator[tuple[_Passing, torch.Tensor]]:
        """Yield each pass with its experts' output."""
        everyone = range(self._paged.experts_of(layer))
        at_once = max(FEWEST_EXPERTS, self.room.experts // self._paged.bytes_per_expert(layer))
        if at_once >= len(everyone):
            with self._paged.experts(layer, everyone) as module:
                for one in here:
                    yield one, self._output_of(module, everyone, one, run_and_show)
            return
        for some in _nearly_equal(everyone, at_once):
            with self._paged.experts(layer, some) as module:
                for one in here:
                    out_TH = self._output_of(module, some, one, run_and_show)
                    one.output_TH = out_TH if one.output_TH is None else one.output_TH.add_(out_TH)
                    one.held.note(one.output_TH)
                    del out_TH
                    self._settle(one, passing)
        for one in here:
            one.held.restore()
            assert one.output_TH is not None
            out_TH, one.output_TH = one.output_TH, None
            yield one, out_TH

    def _output_of(
        self, module: torch.nn.Module, which: range, one: _Passing, run_and_show: _RunAndShow
    ) -> torch.Tensor:
        """What these experts add to the layer's output."""
        one.held.restore()
        assert isinstance(one.lane.door, _Experts)
        return run_and_show(one.number, one.rows, replace(one.lane.door.call, module=module, experts=which))

    def _settle(self, one: _Passing, passing: list[_Passing]) -> None:
        """See that what the passes hold leaves room: of those that take turns, the last is needed again latest."""
        if sum(other.held.bytes_in_memory for other in passing) > self.room.activations:
            one.held.spill()


def _only_run(number: int, rows: slice, call: ExpertsCall) -> torch.Tensor:
    return _run_range(call)


def _nearly_equal(everyone: range, at_once: int) -> Iterator[range]:
    """Ranges of at most so many, whose lengths differ by one at most."""
    pieces = -(-len(everyone) // at_once)
    ends = [len(everyone) * piece // pieces for piece in range(pieces + 1)]
    return (everyone[start:end] for start, end in pairwise(ends))


def _run_and_show(watch: Watch, inside: bool, number: int, rows: slice, call: ExpertsCall) -> torch.Tensor:
    out_TH = call.run() if inside else _run_range(call)
    watch(number, rows, call)
    return out_TH


def _run_range(call: ExpertsCall) -> torch.Tensor:
    """What a call's experts, if they are only some of the layer's, add to its output: `[T, H]`."""
    if call.experts.start == 0 and (call.index_TK < call.experts.stop).all():
        return call.forward(call.module, call.x_TH, call.index_TK, call.weight_TK)
    out_TH = torch.zeros_like(call.x_TH)
    token_N, place_N = torch.where((call.index_TK >= call.experts.start) & (call.index_TK < call.experts.stop))
    if len(token_N):
        index_N1 = (call.index_TK[token_N, place_N] - call.experts.start)[:, None]
        weight_N1 = call.weight_TK[token_N, place_N][:, None]
        out_TH.index_add_(0, token_N, call.forward(call.module, call.x_TH[token_N], index_N1, weight_N1))
    return out_TH
