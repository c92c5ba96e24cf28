"""transformers renamed a model's cache in 5.24, and removes the old name in 5.40: `cppass run` takes either."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import Qwen3ForCausalLM

from cppass.demo.model import cache_argument


def before(input_ids: Any, past_key_values: Any = None, use_cache: bool | None = None) -> None: ...
def since(input_ids: Any, cache: Any = None, use_cache: bool | None = None) -> None: ...


def test_the_name_follows_the_model() -> None:
    assert cache_argument(before) == "past_key_values"
    assert cache_argument(since) == "cache"
    assert cache_argument(Qwen3ForCausalLM.forward) in inspect.signature(Qwen3ForCausalLM.forward).parameters
