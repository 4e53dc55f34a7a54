"""Tiny random models of the architectures that people have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB, WIDTH, BLOCKS = 96, 64, 4
TOKENS = torch.arange(4 * 24).view(4, 24) * 7 % 80 + 3  # none of them special


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: of transformers' AutoConfig.
        model_class: name of the class in transformers.
        entries: of its config.
        takes: "text" is token ids, "decoder" those of a decoder too; "speech", "image".
    """

    model_type: str
    model_class: str
    entries: dict[str, Any]
    takes: str

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model in evaluation mode, with the same random weights every time."""
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.entries)
        made = getattr(transformers, self.model_class)._from_config(config, dtype=dtype)
        scatter(made)
        return made.eval()

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a forward pass gets."""
        noise = torch.Generator().manual_seed(0)
        if self.takes == "image":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=noise).to(dtype)}
        if self.takes == "speech":
            heard = torch.randn(2, 8, 32, generator=noise).to(dtype)
            return {"input_features": heard, "decoder_input_ids": TOKENS[:2]}
        decoder = {"decoder_input_ids": TOKENS[2:]} if self.takes == "decoder" else {}
        return {"input_ids": TOKENS[:2]} | decoder


def scatter(model: nn.Module, std: float = 0.1) -> None:
    """Random weights of a size at which every layer tells in the logits: norms, biases, buffers too."""
    for parameter in model.parameters():
        noise = std * torch.randn_like(parameter)
        parameter.data = noise if parameter.dim() > 1 else parameter.detach() + noise
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer += std * torch.randn_like(buffer)


# Special tokens as in `tiny_models.words`.
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def row(model_type: str, model_class: str, *parts: Any, takes: str = "text", **entries: Any) -> Any:
    """An architecture of the special tokens, of parts of a config and of single entries."""
    merged: dict[str, Any] = dict(SPECIAL)
    for part in (*parts, entries):
        merged |= part
    return Architecture(model_type, model_class, merged, takes)


# fmt: off
# The names of most configs, and those of older ones.
COMMON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS,
          "num_attention_heads": 4}
SIZES = COMMON | {"intermediate_size": 128, "max_position_embeddings": 64}
LLAMA = SIZES | {"num_key_value_heads": 2}
GEMMA = LLAMA | {"head_dim": 16}
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}
FALCON = COMMON | {"max_position_embeddings": 64}
GPT_NEO = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": BLOCKS, "num_heads": 4,
           "intermediate_size": 128, "max_position_embeddings": 64, "window_size": 16,
           "attention_types": [[["global", "local"], 2]]}
MPT = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": BLOCKS, "n_heads": 4, "max_seq_len": 64}
BART = {"vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128, "decoder_start_token_id": 0}

SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 32, "v_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PER_LAYER = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16,
             "num_kv_shared_layers": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def typed(model_type: str, *parts: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """A config inside a config."""
    merged: dict[str, Any] = {"model_type": model_type}
    for part in (*parts, entries):
        merged |= part
    return merged


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": row("llama", "LlamaForCausalLM", LLAMA),
    "Mistral": row("mistral", "MistralForCausalLM", LLAMA, sliding_window=16),
    "Qwen2": row("qwen2", "Qwen2ForCausalLM", LLAMA),
    "Qwen3": row("qwen3", "Qwen3ForCausalLM", GEMMA),
    "Gemma": row("gemma", "GemmaForCausalLM", GEMMA),
    "Gemma 2": row("gemma2", "Gemma2ForCausalLM", GEMMA, SLIDING),
    "Gemma 3 (text)": row("gemma3_text", "Gemma3ForCausalLM", GEMMA, SLIDING),
    "Gemma 3n (text)": row(
        "gemma3n_text", "Gemma3nForCausalLM", GEMMA, SLIDING, PER_LAYER, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        intermediate_size=[128] * BLOCKS),
    "Gemma 4 (text)": row(
        "gemma4_text", "Gemma4ForCausalLM", GEMMA, SLIDING, PER_LAYER, global_head_dim=16),
    "Phi-3": row("phi3", "Phi3ForCausalLM", LLAMA),
    "OPT": row("opt", "OPTForCausalLM", FALCON, ffn_dim=128, word_embed_proj_dim=WIDTH),
    "GPT-2": row("gpt2", "GPT2LMHeadModel", GPT2),
    "GPT-NeoX": row("gpt_neox", "GPTNeoXForCausalLM", SIZES),
    "GPT-Neo": row("gpt_neo", "GPTNeoForCausalLM", GPT_NEO),
    "GPT-J": row("gptj", "GPTJForCausalLM", GPT2, rotary_dim=8),
    "GPT-BigCode": row("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    "Falcon 7B": row("falcon", "FalconForCausalLM", FALCON, multi_query=True),
    "Falcon 40B": row(
        "falcon", "FalconForCausalLM", FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "Falcon RW": row(
        "falcon", "FalconForCausalLM", FALCON, alibi=True, multi_query=False, parallel_attn=False,
        bias=True),
    "Bloom": row(
        "bloom", "BloomForCausalLM", vocab_size=VOCAB, hidden_size=WIDTH, n_layer=BLOCKS, n_head=4),
    "MPT": row("mpt", "MptForCausalLM", MPT, expansion_ratio=2),
    "StableLM": row("stablelm", "StableLmForCausalLM", LLAMA),
    "Cohere": row("cohere", "CohereForCausalLM", LLAMA),
    "Cohere 2": row("cohere2", "Cohere2ForCausalLM", GEMMA, SLIDING),
    "OLMo 2": row("olmo2", "Olmo2ForCausalLM", LLAMA),
    "Granite": row("granite", "GraniteForCausalLM", LLAMA),
    "MiniCPM3": row("minicpm3", "MiniCPM3ForCausalLM", SIZES, LATENT),
    "DiffLlama": row("diffllama", "DiffLlamaForCausalLM", LLAMA),
    "Mamba": row(
        "mamba", "MambaForCausalLM", vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=BLOCKS,
        state_size=8, time_step_rank=8),
    "Mamba 2": row(
        "mamba2", "Mamba2ForCausalLM", vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=BLOCKS,
        state_size=16, num_heads=32, head_dim=4, n_groups=1, chunk_size=16),
    "Jamba": row(
        "jamba", "JambaForCausalLM", LLAMA, EXPERTS, mamba_d_state=8, mamba_dt_rank=8,
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "RecurrentGemma": row(
        "recurrent_gemma", "RecurrentGemmaForCausalLM", COMMON, intermediate_size=128,
        num_key_value_heads=2, lru_width=WIDTH, attention_window_size=32,
        block_types=["recurrent", "recurrent", "attention"]),
    "Mixtral": row("mixtral", "MixtralForCausalLM", LLAMA, LOCAL_EXPERTS),
    "Qwen2-MoE": row(
        "qwen2_moe", "Qwen2MoeForCausalLM", LLAMA, EXPERTS, shared_expert_intermediate_size=64),
    "Qwen3-MoE": row("qwen3_moe", "Qwen3MoeForCausalLM", GEMMA, EXPERTS),
    "DeepSeek-V3": row(
        "deepseek_v3", "DeepseekV3ForCausalLM", SIZES, LATENT, moe_intermediate_size=64,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
        first_k_dense_replace=1),
    "DBRX": row(
        "dbrx", "DbrxForCausalLM", MPT,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}),
    "gpt-oss": row(
        "gpt_oss", "GptOssForCausalLM", GEMMA, SLIDING, LOCAL_EXPERTS, intermediate_size=64),
    "Llama 4 (text)": row(
        "llama4_text", "Llama4ForCausalLM", GEMMA, LOCAL_EXPERTS, num_experts_per_tok=1,
        intermediate_size=64, intermediate_size_mlp=128, interleave_moe_layer_step=2,
        attention_chunk_size=16),
    "Llava": row(
        "llava", "LlavaForConditionalGeneration",
        text_config=typed("llama", LLAMA, SPECIAL),
        vision_config=typed("clip_vision_model", VISION, projection_dim=32),
        image_token_index=VOCAB - 1),
    "Qwen2-VL": row(
        "qwen2_vl", "Qwen2VLForConditionalGeneration",
        text_config=typed("qwen2_vl_text", LLAMA, SPECIAL, rope_parameters={
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 4,
                       "mlp_ratio": 2, "patch_size": 8},
        image_token_id=VOCAB - 1, video_token_id=VOCAB - 2, vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4),
    "Gemma 3": row(
        "gemma3", "Gemma3ForConditionalGeneration",
        text_config=typed("gemma3_text", GEMMA, SLIDING, SPECIAL),
        vision_config=typed("siglip_vision_model", VISION), mm_tokens_per_image=4,
        image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3),
    "Mllama": row(
        "mllama", "MllamaForConditionalGeneration",
        text_config=typed("mllama_text_model", LLAMA, SPECIAL, cross_attention_layers=[1, 3]),
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                       "attention_heads": 4, "image_size": 16, "patch_size": 8,
                       "num_global_layers": 1, "vision_output_dim": 96, "max_num_tiles": 1,
                       "intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [[1, 1]]},
        image_token_index=VOCAB - 1),
    "PaliGemma": row(
        "paligemma", "PaliGemmaForConditionalGeneration",
        text_config=typed("gemma", GEMMA, SPECIAL),
        vision_config=typed("siglip_vision_model", VISION, projection_dim=WIDTH),
        image_token_index=VOCAB - 1, projection_dim=WIDTH),
    "T5": row(
        "t5", "T5ForConditionalGeneration", takes="decoder", vocab_size=VOCAB, d_model=WIDTH, d_kv=16,
        d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "BART": row(
        "bart", "BartForConditionalGeneration", BART, takes="decoder", max_position_embeddings=64),
    "Whisper": row(
        "whisper", "WhisperForConditionalGeneration", BART, takes="speech", num_mel_bins=8,
        max_source_positions=16, max_target_positions=64, suppress_tokens=None,
        begin_suppress_tokens=None),
    "ViT": row(
        "vit", "ViTForImageClassification", VISION, takes="image", num_hidden_layers=BLOCKS),
    "BERT": row("bert", "BertForMaskedLM", SIZES),
}
