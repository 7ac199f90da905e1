"""Router replay: the experts that tokens took in one forward, recorded, and taken again in another.

Between a rollout and its update the router moves, and a token that changes its experts changes its probability by
far more than the step did. Replaying the old policy's experts: GSPO (https://arxiv.org/abs/2507.18071, 5.3); the
rollout's own: R3 (https://arxiv.org/abs/2510.11370); both compared, as R2 and R3:
https://arxiv.org/abs/2512.01374.

Only the choice is replayed. Weights are those that the present router gives the recorded experts, and so is their
gradient. Shapes: B sequences, S positions, T = B S tokens, K experts per token.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_moe.model.chosen_experts import LISTENERS, TELLS, listening, tell
from hf_moe.model.router import HfMoeRouter
from hf_moe.routers import Router

UNKNOWN = -1  # a position whose experts were not recorded takes the router's own
Indices = dict[str, torch.Tensor]  # router -> [B, S, K] in int16


def check_replayable(routers: dict[str, Router], model: nn.Module) -> None:
    """Raises ValueError for routers whose formula for the weights is not known."""
    unknown = [name for name, router in routers.items() if not (owned(router) or takes_choice(router))]
    if unknown or not routers:
        which = f"{unknown[0]} of {type(model).__name__} is not" if unknown else f"{type(model).__name__} has none"
        raise ValueError(
            "router_replay needs routers whose weights are known for experts that were chosen elsewhere, "
            f"but {which}: set it to none."
        )


def owned(router: Router) -> bool:
    return isinstance(router.module, HfMoeRouter)


def takes_choice(router: Router) -> bool:
    """Whether it is one of Transformers' own beside experts that are given indices and weights that are understood."""
    return router.layer is not None and router.found.scale is not None


@contextmanager
def recording(routers: dict[str, Router]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect the experts [T, K] of every forward inside the context, router by router; they are there behind it.

    hf_moe's recorded steps of decoding are heard, too.
    """
    calls = {}

    # An outer recording's hooks tell this one, too.
    handles = [] if LISTENERS else [telling(name, router) for name, router in routers.items()]
    try:
        with listening() as heard:
            yield calls
    finally:
        for handle in handles:
            handle.remove()
    for name, router in routers.items():
        if router.module in heard:
            calls[name] = [index.to(torch.int16) for index in heard[router.module]]


def telling(name: str, router: Router) -> RemovableHandle:
    """Each of its calls tells the experts that its tokens take."""

    def tell_own(module, args, output):
        _, _, index_TK, token_S, _ = output
        if token_S is not None:
            raise ValueError(f"{name} lets experts choose tokens in training: set router_replay to rollout.")
        tell(module, index_TK)

    def tell_given(module, args, kwargs):
        tell(router.module, (*args, *kwargs.values())[1])

    setattr(tell_own, TELLS, True)
    if owned(router):
        return router.module.register_forward_hook(tell_own)
    return router.layer.experts.register_forward_pre_hook(tell_given, with_kwargs=True)


@contextmanager
def replayed(routers: dict[str, Router], indices: Indices) -> Iterator[None]:
    """Routers take the experts in `indices` in every forward inside the context.

    To be open until the backward pass is over: activation checkpointing repeats the forward there.
    """
    with ExitStack() as stack:
        for name, index_BSK in indices.items():
            replay = replay_in_router if owned(routers[name]) else replay_in_experts
            for handle in replay(routers[name], index_BSK.flatten(0, 1)):
                stack.callback(handle.remove)
        yield


def replay_in_router(router: Router, recorded_TK: torch.Tensor) -> list[RemovableHandle]:
    """hf_moe's routers assign tokens anew."""

    seen = []

    def hook(module, args, output):
        logits_TE, *_, loss_input = output
        hidden_TD, mask_T, ids_T = (*args, None, None)[:3]
        index_TK = recorded_TK.to(logits_TE.device, torch.long)
        # As outside training, where a token's experts depend on nothing but the token.
        state = module.state(hidden_TD.float(), mask_T, ids_T)._replace(training=False, replayed_TK=index_TK)
        assignment = module.assigned(logits_TE, state)
        if not seen:  # once: it waits for the device
            seen.append(True)
            check_replayed(router, index_TK, assignment.index_TK)
        return (logits_TE, *assignment, loss_input)

    hashed = router.own.hashed  # which always chooses the same
    return [] if hashed else [router.module.register_forward_hook(hook)]


def check_replayed(router: Router, recorded_TK: torch.Tensor, index_TK: torch.Tensor) -> None:
    """Raises ValueError for a router that chose others than those it was told."""
    if index_TK.shape != recorded_TK.shape or ((recorded_TK != UNKNOWN) & (recorded_TK != index_TK)).any():
        raise ValueError(
            f"router_replay is on, but router_type {router.module.config.router_type!r} chooses anew: let it take "
            "state.replayed_TK, as hf_moe.model.routing.choose does, or set router_replay to none."
        )


def replay_in_experts(router: Router, recorded_TK: torch.Tensor) -> list[RemovableHandle]:
    """The experts beside one of Transformers' own are given others than it chose, and their weights."""
    logits = []

    def remember(module, args, output):
        logits[:] = [router.logits_of(output)]

    def exchange(module, args, kwargs):
        hidden_TD, index_TK, weights_TK = (*args, *kwargs.values())
        recorded = recorded_TK.to(index_TK)
        index_TK = torch.where(recorded == UNKNOWN, index_TK, recorded)
        return (hidden_TD, index_TK, router.weights(logits.pop(), index_TK).to(weights_TK.dtype)), {}

    experts = router.layer.experts
    return [
        router.module.register_forward_hook(remember),
        experts.register_forward_pre_hook(exchange, with_kwargs=True),
    ]


def of_generation(calls: dict[str, list[torch.Tensor]], sequences: int) -> Indices:
    """What a `generate()` recorded: the prompt's positions in the first forward, one more in each that follows."""
    return {name: torch.cat([x.view(sequences, -1, x.shape[-1]) for x in parts], 1) for name, parts in calls.items()}


def of_batches(calls: dict[str, list[torch.Tensor]], positions: int) -> Indices:
    """What the forwards of batches of whole sequences recorded."""
    return {name: torch.cat([x.view(-1, positions, x.shape[-1]) for x in parts]) for name, parts in calls.items()}


def fit(indices: Indices, mask_BS: torch.Tensor) -> Indices:
    """Cut or continued to the positions of `mask_BS`; unknown where that is 0, in each text's last one, and where
    nothing was recorded.

    A generation does not route its last token, or no row reads it any more, nor does any probability depend on it.
    """
    fitted, read_BS = {}, mask_BS.bool() & (mask_BS.flip(1).cumsum(1).flip(1) > 1)
    for name, index in indices.items():
        index = index[:, : mask_BS.shape[1]]
        index = nn.functional.pad(index, (0, 0, 0, mask_BS.shape[1] - index.shape[1]), value=UNKNOWN)
        fitted[name] = index.masked_fill(~read_BS.unsqueeze(-1), UNKNOWN)
    return fitted
