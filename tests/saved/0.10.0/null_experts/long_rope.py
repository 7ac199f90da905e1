"""Generation across the length at which LongRoPE changes its frequencies."""

from transformers.generation import GenerationMixin

from .host import CACHE, shown_as


class HfMoeLongRope:
    """What LongRoPE (https://arxiv.org/abs/2402.13753) adds to a causal language model."""

    @shown_as(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads there what it may be given
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """As Phi-3's: once the text outgrows the original length, keys turned by the short frequencies are dropped.

        The whole text is then read again, once, with the long ones.
        """
        rope, cache = self.config.rope_parameters, kwargs.get(CACHE)
        if rope.get("rope_type") == "longrope" and cache is not None:
            original = rope["original_max_position_embeddings"]
            if 0 < cache.get_seq_length() <= original < input_ids.shape[1]:
                kwargs[CACHE] = kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, **kwargs)
