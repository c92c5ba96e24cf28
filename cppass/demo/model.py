"""The model and the caches of a run in the dialect "hf": transformers' public parts, and nothing of cppass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from cppass.demo.job import Job, count
from cppass.demo.presets import PRESETS
from cppass.demo.results import ModelFacts
from cppass.demo.subject import Forward
from cppass.errors import OptionError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel


class HuggingFace:
    """A Subject: a causal LM of transformers."""

    def __init__(self, job: Job) -> None:
        self.module = build(job)
        self.facts = facts(job, self.module)
        self._job = job

    def begin(self) -> Conversation:
        return Conversation(fresh_cache(self._job, self.module), cache_argument(self.module.forward))


class Conversation:
    """A Session on a cache of transformers, or on none."""

    def __init__(self, cache: Cache | None, argument: str) -> None:
        self._cache, self._argument = cache, argument

    def step(self, forward: Forward, ids: torch.Tensor) -> torch.Tensor:
        cache = {self._argument: self._cache}
        out = forward(input_ids=ids, use_cache=self._cache is not None, logits_to_keep=1, **cache)
        logits: torch.Tensor = out.logits[:, -1]
        return logits

    def keys_and_values(self) -> list[torch.Tensor]:
        return keys_and_values(self._cache)


def build(job: Job) -> PreTrainedModel:
    """The causal LM of the job in eval mode: the same weights in every process, by seed or from the same files.

    Raises:
        OptionError: CP051, the directory holds no causal LM that transformers knows, or fewer layers than asked for.
    """
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "attn_implementation": job.attention}
    torch.manual_seed(job.seed)
    if job.model is None:
        config = PRESETS[job.preset].config(job.layers, job.vocab, job.tokens + job.decode)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **how)  # type: ignore[no-untyped-call]
        model.train(False)
        return model
    config = _checkpoint_config(job.model, job.layers)
    how |= {"config": config, "local_files_only": True, "output_loading_info": True}
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(job.model, **how)
    except Exception as error:  # of transformers, safetensors, json, torch: whatever is wrong with the files
        raise OptionError(
            "CP051",
            f"cannot load {job.model!r}: {_first_sentence(error)}",
            "its files must be whole and of one model; it may need another --attention",
        ) from error
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):
        raise OptionError(
            "CP051",
            f"{job.model!r} lacks {count(len(missing), 'weight')}, {missing[0]} the first",
            "give --model a whole checkpoint of a causal LM: what is missing would be random",
        )
    model.train(False)
    return model


def _checkpoint_config(folder: str, layers: int | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise OptionError(
            "CP051",
            f"cannot read the config of {folder!r}: {_first_sentence(error)}",
            "transformers must know its type",
        ) from error
    text = config.get_text_config(decoder=True)
    if layers is not None:
        if layers > text.num_hidden_layers:
            has = count(text.num_hidden_layers, "layer")
            raise OptionError("CP051", f"--layers {layers}, but {folder!r} has {has}", f"give at most {has}")
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers = layers
    return config


def facts(job: Job, model: PreTrainedModel) -> ModelFacts:
    """What was built, in numbers."""
    config = model.config.get_text_config(decoder=True)
    return ModelFacts(
        family=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=_heads(config),
        kv_heads=_kv_heads(config),
        head_dim=_head_dim(config),
        vocab=config.vocab_size,
        experts=getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0,
        note=_note(job, config.num_hidden_layers, config.vocab_size),
    )


def _note(job: Job, layers: int, vocab: int) -> str:
    if job.model is not None:
        return f"first {count(layers, 'layer')} of the checkpoint" if job.layers else ""
    return PRESETS[job.preset].note(layers, vocab)


def fresh_cache(job: Job, model: PreTrainedModel) -> Cache | None:
    """An empty cache for one prefill and its decode steps; a static one is allocated here, not in compiled code."""
    from transformers import DynamicCache, StaticCache

    if job.cache == "none":
        return None
    if job.cache == "dynamic":
        return DynamicCache(config=model.config)
    cache = StaticCache(config=model.config, max_cache_len=job.tokens + job.decode)
    config = model.config.get_text_config(decoder=True)
    cache.early_initialization(job.batch, _kv_heads(config), _head_dim(config), model.dtype, model.device)
    return cache


def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model's forward calls its cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def keys_and_values(cache: Cache | None) -> list[torch.Tensor]:
    """K and V of every layer that has them, [batch, kv_heads, length, head_dim], in layer order."""
    layers = cache.layers if cache is not None else []
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return [t for pair in pairs for t in pair if isinstance(t, torch.Tensor)]


def _heads(config: PreTrainedConfig) -> int:
    """0 for a model without attention."""
    return int(getattr(config, "num_attention_heads", None) or 0)


def _kv_heads(config: PreTrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", None) or _heads(config))


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // max(1, _heads(config)))


def _first_sentence(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__
