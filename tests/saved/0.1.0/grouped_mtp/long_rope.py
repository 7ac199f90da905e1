"""Generation across the length at which LongRoPE changes its frequencies."""


class HfMoeLongRope:
    """What LongRoPE (https://arxiv.org/abs/2402.13753) adds to a causal language model."""

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, inputs_embeds=None, **kwargs):
        """As Phi-3's: once the text outgrows the original length, keys turned by the short frequencies are dropped.

        The whole text is then read again, once, with the long ones.
        """
        rope = self.config.rope_parameters
        if rope.get("rope_type") == "longrope" and past_key_values is not None:
            original = rope["original_max_position_embeddings"]
            if 0 < past_key_values.get_seq_length() <= original < input_ids.shape[1]:
                past_key_values = kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )
