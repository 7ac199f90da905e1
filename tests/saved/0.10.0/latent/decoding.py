"""Decoding on a GPU: the step of one token is recorded once as a CUDA graph and replayed, through `generate()`.

A step of a mixture of experts is hundreds of small launches, which take longer to ask for than to run; a graph asks
once. The cache is reserved for the whole text, so that its addresses stay. `generate()` does this by itself for greedy
decoding and sampling; `disable_compile=True` or a cache of the caller's choice turns it off.

Shapes: B rows, N tokens of the text, S positions that the cache has room for, V vocabulary.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import logging

from .chosen_experts import LISTENERS, TELLS, listening, tell
from .growing_text import GrowingText
from .host import CACHE, OF_GENERATE, does_nothing, of_the_user, shown_as

logger = logging.get_logger(__name__)

ROUND = 256  # capacities are multiples of this, so that texts of about one length share a cache and its graph
WORTH_RECORDING = 8  # steps; recording costs about as much as three
RECORDED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

# Ways to be faster that these files lack: each takes the model and the number of tokens, and is a context in which the
# prompt is read and the step recorded. hf_moe.kernels adds its own.
SPEEDUPS: list[Callable[[nn.Module, int], AbstractContextManager]] = []

# Full names of classes of parameters that are several tensors, which what is recorded reads: hf_moe adds its own.
STORED: set[str] = set()

# The cache and the graph of a model's last text, for its next one. Taken out while in use.
KEPT: "weakref.WeakKeyDictionary[nn.Module, HfMoeReservedCache]" = weakref.WeakKeyDictionary()


class HfMoeReservedLayer(StaticLayer):
    """A static layer that shows the positions it has filled, as a dynamic one does.

    While a step is `recorded`, it shows all its positions and counts on the device, as static layers do: a graph knows
    no lengths.
    """

    is_croppable = True

    def __init__(self, max_cache_len: int):
        super().__init__(max_cache_len)
        self.length = 0
        self.recorded = False

    @property
    def is_compileable(self) -> bool:
        return self.recorded

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.max_cache_len, x.shape[3]) for x in (key_states, value_states)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.recorded:
            return super().update(key_states, value_states, *args, **kwargs)
        self.reserve(self.length + key_states.shape[2])
        begin, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, begin : self.length] = key_states
        self.values[:, :, begin : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def reserve(self, positions: int) -> None:
        """Room for so many positions: moves to larger memory if there is less."""
        if positions <= self.max_cache_len:
            return
        self.max_cache_len = -(-positions // ROUND) * ROUND
        if self.is_initialized:
            keys, values, filled = self.keys, self.values, self.length
            self.lazy_initialization(keys, values)
            self.keys[:, :, :filled], self.values[:, :, :filled] = keys[:, :, :filled], values[:, :, :filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.max_cache_len if self.recorded else self.length + query_length), 0

    def get_seq_length(self) -> int | torch.Tensor:
        return self.cumulative_length if self.recorded else self.length

    def crop(self, tokens_to_remove: int) -> None:
        self.length -= abs(tokens_to_remove)

    def reset(self) -> None:
        self.length = 0


class HfMoeReservedCache(Cache):
    """A cache with room for a whole text, and the recorded step that reads and writes it."""

    def __init__(self, layers: int, positions: int):
        capacity = -(-positions // ROUND) * ROUND
        super().__init__(layers=[HfMoeReservedLayer(capacity) for _ in range(layers)])
        self.step: RecordedStep | None = None
        self.drafts: HfMoeReservedCache | None = None  # that of the MTP modules, where they draft beside it
        self.unfinished: torch.Tensor | None = None  # [B], false in rows that nobody reads, which a step may leave out

    @property
    def parts(self) -> list["HfMoeReservedCache"]:
        return [self] if self.drafts is None else [self, self.drafts]

    def fits(self, rows: int, positions: int, device: torch.device) -> bool:
        """Whether a text of so many rows and positions may take this cache's memory."""
        first = self.layers[0]
        return (
            first.is_initialized
            and first.keys.device == device
            and first.keys.shape[0] == rows
            and positions <= first.max_cache_len <= 4 * max(positions, ROUND)
            and first.keys.is_inference() == torch.is_inference_mode_enabled()
        )


@contextmanager
def sped_up(model: nn.Module, tokens: int):
    """Inside, `model` reads so many tokens as fast as `SPEEDUPS` make it; gives what they hold."""
    with ExitStack() as stack:
        yield [stack.enter_context(speedup(model, tokens)) for speedup in SPEEDUPS]


@contextmanager
def kept_garbage():
    """Inside, garbage stays: it may hold a graph, and a graph that goes while another is recorded ends the other."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Recording:
    """What `run` launches, as a CUDA graph: each call does it again, and gives the same tensors, overwritten.

    `run` is called twice, for the first time to load kernels and fill workspaces, which can't be recorded. Raises what
    it raises where it can't be recorded, such as where it waits for the device.
    """

    def __init__(self, run: Callable, model: nn.Module, tokens: int):
        device = model.device
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with sped_up(model, tokens) as self.held:
            # What it draws at random is not drawn: a text after a recording is that of its seed.
            with torch.random.fork_rng([device]), torch.cuda.stream(stream), listening(alone=True):
                run()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
            with kept_garbage(), graph, listening(alone=True) as self.chosen:  # and what is heard keeps its memory
                self.result = run()

    def __call__(self):
        self.graph.replay()
        if LISTENERS and self.chosen:
            self.tell_chosen()
        return self.result

    def tell_chosen(self) -> None:
        """What the replay wrote over, in memory of its own, by few launches."""
        told = [(router, index) for router, calls in self.chosen.items() for index in calls]
        copied = torch.cat([index.flatten() for _, index in told]).to(torch.int16)
        for (router, index), x in zip(told, copied.split([index.numel() for _, index in told]), strict=True):
            tell(router, x.view_as(index))


class RecordedStep:
    """One token of every row through the model, as a recording that `cache` belongs to.

    `run` is what is recorded; the classes below this one record more.
    """

    def __init__(self, model: nn.Module, cache: HfMoeReservedCache, rows: int, padded: bool):
        self.model_of, self.cache, self.tokens = weakref.ref(model), cache, rows
        self.layers = [layer for part in cache.parts for layer in part.layers]
        device, positions = model.device, max(layer.max_cache_len for layer in self.layers)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(rows, 1, dtype=torch.long, device=device)  # of the first token to come
        self.mask = torch.ones(rows, positions, dtype=torch.bool, device=device) if padded else None
        cache.unfinished = torch.ones(rows, dtype=torch.bool, device=device) if rows > 1 else None

    @property
    def model(self) -> nn.Module:
        """Which is not kept alive: it keeps the cache of its last text, and that its step."""
        return self.model_of()

    def record(self) -> None:
        """Raises as `Recording` does."""
        self.lengths = counted_together(self.layers)
        try:
            self.count_on_device(True)
            self.replay = Recording(self.run, self.model, self.tokens)
        finally:
            self.count_on_device(False)

    def count_on_device(self, recorded: bool) -> None:
        for layer in self.layers:
            layer.recorded = recorded
        self.lengths.copy_(torch.tensor([layer.length for layer in self.layers], device="cpu"))

    def begin(self, position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Start behind what the cache holds: the next tokens' positions [B, 1], and the mask [B, N] up to them."""
        self.count_on_device(False)
        self.position.copy_(position_ids)
        if self.cache.unfinished is not None:
            self.cache.unfinished.fill_(True)
        if self.mask is not None:
            self.mask.fill_(True)
            self.mask[:, : attention_mask.shape[1]] = attention_mask.bool()

    def run(self) -> torch.Tensor:
        outputs = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.position.add_(1)
        return outputs.logits[:, -1].float()

    def __call__(self, token: torch.Tensor, unfinished: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, V] in float32 after the tokens [B]; overwritten by the next call.

        Where `unfinished` [B] is false, nobody reads the row's logits, now or later: they may be anything finite.
        """
        self.ids.copy_(token.unsqueeze(1))
        if self.cache.unfinished is not None and unfinished is not None:
            self.cache.unfinished.copy_(unfinished)
        logits = self.replay()
        for layer in self.cache.layers:
            layer.length += 1
        return logits


def counted_together(layers: list[HfMoeReservedLayer]) -> torch.Tensor:
    """The layers' lengths on the device as one tensor, of which they have the elements: one launch changes all."""
    lengths = layers[0].cumulative_length.new_zeros(len(layers), 2)[:, 0]  # 16 bytes apart, as kernels like addresses
    for layer, length in zip(layers, lengths.unbind(), strict=True):
        layer.cumulative_length = length
    return lengths


class EagerStep:
    """The same step as it is, where it isn't worth a recording or can't be recorded."""

    def __init__(self, model: nn.Module, cache: HfMoeReservedCache):
        self.model, self.cache = model, cache

    def begin(self, position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """As RecordedStep.begin."""
        self.position, self.mask = position_ids, attention_mask

    def __call__(self, token: torch.Tensor, unfinished: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, V] in float32 after the tokens [B], of all rows."""
        outputs = self.model(
            input_ids=token.unsqueeze(1),
            attention_mask=self.mask,
            position_ids=self.position,
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=1)
        return outputs.logits[:, -1].float()


def recording_key(model: nn.Module, cache: HfMoeReservedCache):
    """Equal where what was recorded may be replayed: it holds addresses, and all that was decided on the way."""
    modules = list(model.modules())
    tensors = [
        *(x for parameter in model.parameters() for x in plain_tensors(parameter)),
        *model.buffers(),
        *(x for part in cache.parts for layer in part.layers for x in (layer.keys, layer.values)),
    ]
    changed = [id(m) for m in modules if "forward" in vars(m)]
    changed += [id(m) for m in modules if any(hasattr(hook, TELLS) for hook in m._forward_hooks.values())]
    adapted = [plain_attributes(m) for m in modules if hasattr(m, "base_layer")]  # which adapters add, and how much
    pointers = tuple((x.data_ptr(), x.dtype) for x in tensors)
    return pointers, tuple(map(id, modules)), tuple(changed), repr(adapted), repr(vars(model.config))


def plain_attributes(module: nn.Module) -> dict:
    """What a layer of PEFT's decides by, beside its weights."""
    kinds, every = (bool, int, float, str, list, dict), vars(nn.Module())
    return {x: y for x, y in vars(module).items() if x not in every and type(y) in kinds and x != "_caches"}


def recorded(kind: type[RecordedStep], model: nn.Module, cache: HfMoeReservedCache, steps: int, *settings):
    """The `kind` of step with its `settings` that `cache` has, or a new one; None where it isn't worth it, with so few
    steps to come, or can't be recorded."""
    key = kind, repr(settings), recording_key(model, cache)
    if cache.step is not None and cache.step.key == key:
        return cache.step
    cache.step = None
    if steps >= WORTH_RECORDING:
        try:
            step = kind(model, cache, *settings)
            step.record()
        except RuntimeError as error:
            logger.warning_once(f"Decoding without a CUDA graph, which could not be recorded: {error}")
        else:
            cache.step, step.key = step, key
    return cache.step


def beyond(drafts: int) -> int:
    """Positions that are read past a text's last token: drafts, and those of a round that is noticed too late."""
    return 2 * drafts + 1


def reserve_cache(model: nn.Module, rows: int, positions: int) -> HfMoeReservedCache:
    """The cache of the last text where it fits, or a new one."""
    cache = KEPT.pop(model, None)
    if cache is None or not cache.fits(rows, positions, model.device):
        del cache  # before the new one takes memory
        return HfMoeReservedCache(model.config.num_hidden_layers, positions)
    cache.reset()
    return cache


def keep_for_the_next(model: nn.Module, cache: HfMoeReservedCache, config) -> None:
    """Text, unless somebody has the cache of this one."""
    if not config.return_dict_in_generate and not of_the_user(cache):
        KEPT[model] = cache


def forget(model: nn.Module) -> None:
    """Give back the memory that is kept for the model's next text."""
    KEPT.pop(model, None)


def watched(module: nn.Module) -> bool:
    """Whether somebody's hook is to see every call, which a replay doesn't make."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(hasattr(hook, TELLS) or does_nothing(hook) for hook in hooks)


def plain_tensors(parameter: torch.Tensor) -> list[torch.Tensor]:
    """What a parameter is made of: itself, or what one of STORED holds; nothing of another class."""
    kind = type(parameter)
    if kind in (nn.Parameter, torch.Tensor):
        return [parameter]
    if f"{kind.__module__}.{kind.__qualname__}" in STORED:
        return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    return []


def obstacles(model: nn.Module) -> Iterator[str]:
    """Why a step can't be recorded: what of it waits for the device, or for Python, or is not on one GPU."""
    config, modules, name = model.config, list(model.modules()), type(model).__name__
    device = model.device  # looks through all parameters
    if device.type != "cuda":
        yield f"{name} is on {device}, not on a GPU"
    if model.training:
        yield f"{name} is in training mode: call model.eval()"
    tensors = list(map(plain_tensors, model.parameters()))
    if getattr(model, "hf_quantizer", None) is not None and max(map(len, tensors)) <= 1:
        yield f"{name} is quantised in a way whose codes no recorded step reads"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) != 1:
        yield f"{name} is on several devices"
    if not all(parts and all(x.device == device for x in parts) for parts in tensors):
        yield f"parameters of {name} are not plain tensors on {device}"
    if config._attn_implementation not in ("eager", "sdpa"):
        yield f"its attention is {config._attn_implementation!r}, not 'sdpa' or 'eager'"
    # The experts of Transformers' interface know whether they are gated.
    routed = any(hasattr(x, "has_gate") or getattr(x, "routes", False) for x in modules)
    if routed and config._experts_implementation == "eager":
        yield "eager experts count tokens on the host: model.set_experts_implementation('hf_moe') does not"
    if any(map(watched, modules)):
        yield "a hook on a module is to see every call"
    if any(kind in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope")):
        yield "its RoPE looks at the length on the host"


def recordable(model: nn.Module) -> bool:
    """Whether nothing is in a recording's way."""
    return next(obstacles(model), None) is None


def wishes(generation_config, model_kwargs: dict, generation_mode: GenerationMode, drafts: int = 0) -> Iterator[str]:
    """What the caller of `generate` asked for that a recorded step, or a round of `drafts`, does not do."""
    if not isinstance(model_kwargs.get(CACHE), HfMoeReservedCache | None):
        yield "a cache was given"
    if generation_config.cache_implementation is not None:
        yield f"cache_implementation is {generation_config.cache_implementation!r}"
    if generation_mode not in RECORDED and not drafts:
        yield f"{generation_mode.value} has no recorded step, as greedy decoding and sampling have"
    if generation_config.disable_compile:
        yield "disable_compile is true"
    if generation_config.use_cache is False:
        yield "use_cache is false"


class Late:
    """What a step leaves on the device, read one step late, so that the host never waits for the step it has just
    asked for."""

    def __init__(self):
        self.copies, self.events, self.count = [], [torch.cuda.Event() for _ in range(2)], 0

    def put(self, x: torch.Tensor) -> torch.Tensor | None:
        """Take this step's tensor and give the last one's, until the next call; None at first."""
        if not self.copies:
            self.copies = [torch.zeros_like(x, device="cpu", pin_memory=True) for _ in range(2)]
        slot, self.count = self.count % 2, self.count + 1
        self.copies[slot].copy_(x, non_blocking=True)
        self.events[slot].record()
        if self.count == 1:
            return None
        self.events[1 - slot].synchronize()
        return self.copies[1 - slot]


class HfMoeDecoding:
    """`generate()` with recorded steps; everything else it can do goes Transformers' way."""

    @shown_as(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """What forward takes of generate's arguments."""
        kwargs = {name: value for name, value in kwargs.items() if name not in OF_GENERATE}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def recorded_drafts(self, generation_config) -> int:
        """Drafts that a recorded round has."""
        return 0

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, positions):
        drafts = self.recorded_drafts(generation_config)
        other = next(wishes(generation_config, model_kwargs, generation_mode, drafts), None)
        if model_kwargs.get(CACHE) is not None or other is not None or not recordable(self):
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, positions
            )
            return
        rows = batch_size * generation_config.num_return_sequences
        model_kwargs[CACHE] = reserve_cache(self, rows, positions + beyond(drafts))

    def _optimize_model_for_decode(self):
        """Nothing: Transformers would switch to batched_mm here, which copies the weights of each token's experts."""
        return nullcontext()

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus: bool = False,
        streamer=None,
        **model_kwargs,
    ):
        cache, config = model_kwargs.get(CACHE), generation_config
        known = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", *OF_GENERATE}
        others = any(value is not None for name, value in model_kwargs.items() if name not in known)
        recorded = config.output_attentions or config.output_hidden_states
        here = isinstance(cache, HfMoeReservedCache) and input_ids.device == self.device and recordable(self)
        if not here or others or recorded or synced_gpus:
            return super()._sample(
                input_ids, logits_processor, stopping_criteria, config, synced_gpus, streamer, **model_kwargs
            )
        with torch.cuda.device(self.device):  # where kernels, streams and events go
            return self._sample_recorded(
                input_ids, logits_processor, stopping_criteria, config, streamer, cache, model_kwargs
            )

    def _sample_recorded(
        self, ids, logits_processor, stopping_criteria, config, streamer, cache: HfMoeReservedCache, model_kwargs: dict
    ):
        """Transformers' `_sample` with the step replayed, and the end of the text noticed one step late.

        A step is recorded behind the first token, which does not wait for it.
        """
        text, step = GrowingText(ids, logits_processor, stopping_criteria, config, streamer), None
        logits, model_kwargs = self._read_prompt(ids, config, model_kwargs)
        late = Late() if text.watched and streamer is None else None
        while True:
            scores = text.process(logits)
            if config.do_sample:
                token = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
            else:
                token = scores.argmax(dim=-1)
            token = text.add(token)
            ended_before = late is not None and bool(late.put(text.ended))
            if ended_before or text.full or (late is None and text.watched and bool(text.ended)):
                break
            step = step or self._step_after(text, cache, model_kwargs)
            logits = step(token, text.read)

        if ended_before:  # one token earlier
            text.take_back()
            cache.crop(-1)
        keep_for_the_next(self, cache, config)
        return text.output(cache)

    def _read_prompt(self, ids: torch.Tensor, config, model_kwargs: dict) -> tuple[torch.Tensor, dict]:
        """Logits [B, V] after the prompt, in float32 and memory of their own, and the arguments of what follows."""
        with sped_up(self, ids.numel()):
            outputs = self._prefill(ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
        model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32), model_kwargs

    def _step_after(
        self, text: GrowingText, cache: HfMoeReservedCache, model_kwargs: dict
    ) -> "RecordedStep | EagerStep":
        """The step, recorded or eager, behind what `cache` holds, which gets room for the whole text.

        It reads the text's last token next.
        """
        rows, attention_mask = len(text.ids), model_kwargs.get("attention_mask")
        steps = text.limit - text.ids.shape[1] if text.limit else WORTH_RECORDING
        for layer in cache.layers:
            layer.reserve(layer.length + steps)
        positions = model_kwargs.get("position_ids")
        if positions is None:
            position = torch.full((rows, 1), cache.get_seq_length(), device=text.ids.device)
        else:
            position = positions[:, -1:].expand(rows, 1)
        padded = attention_mask is not None and not bool(attention_mask.all())
        step = recorded(RecordedStep, self, cache, steps, rows, padded) or EagerStep(self, cache)
        step.begin(position, attention_mask)
        return step
