"""Models that may be compiled: odd weights, attention of other kinds, graph breaks, ops that misbehave."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from errors.rank_case import Case, after, case, on
from errors.tiny_model import HIDDEN, VOCABULARY, Tiny, token_ids, visible
from torch import Tensor, nn
from torch.nn import functional

# -- weights -----------------------------------------------------------------------------------------------------------


@case
def a_weight_that_is_nan() -> Case:
    model = Tiny()
    with torch.no_grad():
        model.project.weight[3, 3] = torch.nan
    return Case(model, on(token_ids(1, 64)))


@case
def an_embedding_that_is_nan() -> Case:
    """Of the first token, which every row sees."""
    model = Tiny()
    with torch.no_grad():
        model.words.weight[int(token_ids(1, 64)[0, 0])] = torch.nan
    return Case(model, on(token_ids(1, 64)))


@case
def tied_weights() -> Case:
    model = Tiny()
    model.vocabulary.weight = model.words.weight
    return Case(model, on(token_ids(1, 16)))


@case
def quantised_linear() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Tiny(), {nn.Linear}, torch.qint8)
    return Case(model, on(token_ids(1, 16)), tolerance=1e-1)


# -- models ------------------------------------------------------------------------------------------------------------


@case
def no_attention() -> Case:
    return Case(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), on(torch.ones(1, 16, 8)))


@case
def cross_attention() -> Case:
    class Crossing(Tiny):
        def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
            x = super().hidden_states(self.words(ids))
            return functional.scaled_dot_product_attention(x[:, None], memory[:, None], memory[:, None])

    return Case(Crossing(), on(token_ids(1, 16), torch.ones(1, 9, HIDDEN)))


@case
def an_encoder_beside_a_decoder() -> Case:
    class Both(Tiny):
        def forward(self, ids: Tensor, others: Tensor) -> Tensor:
            memory, x = (self.hidden_states(self.words(i)) for i in (others, ids))
            return functional.scaled_dot_product_attention(x[:, None], memory[:, None], memory[:, None])

    return Case(Both(), on(token_ids(1, 16), token_ids(1, 24)))


@case
def torchs_multi_head_attention_with_weights() -> Case:
    attention = nn.MultiheadAttention(16, 4).eval()
    mask = ~visible(16)
    return Case(
        lambda x: attention(x, x, x, attn_mask=mask),
        on(torch.randn(16, 2, 16, generator=torch.Generator().manual_seed(0))),
    )


@case
def torchs_transformer_encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    return Case(layer, on(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))))


@case
def flex_attention() -> Case:
    from torch.nn.attention.flex_attention import flex_attention

    return Case(flex_attention, on(*(torch.ones(1, 2, 16, 8) for _ in range(3))))


@case
def dropout_in_training_mode() -> Case:
    return Case(Tiny(dropout=0.1).train(), on(token_ids(1, 16)))


@case
def dropout_between_layers() -> Case:
    model = Tiny()
    model.vocabulary = nn.Sequential(nn.Dropout(0.1), model.vocabulary)
    return Case(model.train(), on(token_ids(1, 16)))


@case
def dropout_in_eval_mode() -> Case:
    return Case(Tiny(dropout=0.1).eval(), on(token_ids(1, 16)))


@case
def gradients() -> Case:
    return Case(Tiny(), on(token_ids(1, 16)), gradients=True)


@case
def a_complex_rope() -> Case:
    class Rotated(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            x = torch.view_as_complex(self.words(ids).unflatten(-1, (-1, 2)))
            turned = x * torch.polar(torch.ones(16, 1), torch.arange(16.0)[:, None] * 0.1)
            return super().hidden_states(torch.view_as_real(turned).flatten(-2))

    return Case(Rotated(), on(token_ids(1, 16)))


@case
def hooks() -> Case:
    model = Tiny()
    model.project.register_forward_hook(lambda module, given, out: out * 2)
    model.register_forward_pre_hook(lambda module, given: given)
    return Case(model, on(token_ids(1, 16)))


@case
def a_compiled_part() -> Case:
    model = Tiny()
    model.project = torch.compile(model.project, backend="eager")
    return Case(model, on(token_ids(1, 16)))


@case
def a_graph_break_inside_attention() -> Case:
    class Broken(Tiny):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            scores = q @ k.transpose(2, 3)
            torch._dynamo.graph_break()
            return scores.masked_fill(~visible(scores.shape[-1]), -torch.inf).softmax(-1) @ v

    return Case(Broken(), on(token_ids(1, 16)))


@case
def control_flow_that_depends_on_data() -> Case:
    return after(lambda logits, ids: logits * 2 if logits.sum() > 0 else logits - 1)


@case
def control_flow_that_depends_on_data_in_a_whole_graph() -> Case:
    return dataclasses.replace(control_flow_that_depends_on_data(), compile={"fullgraph": True})


@case
def a_number_read_from_a_tensor() -> Case:
    return after(lambda logits, ids: logits * ids.max().item())


@case
def branches_and_loops_behind_attention() -> Case:
    from torch._higher_order_ops.scan import scan

    def act(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        branch = torch.cond(ids.sum() > 0, lambda x: x.view(-1) * 2, lambda x: x.view(-1) - 1, (logits,))
        loop = torch.while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x * 2), (torch.tensor(0), logits))[1]
        return branch, loop, scan(lambda c, x: (c + x, c + x), torch.zeros(1, VOCABULARY), logits, dim=1)[1]

    return after(act)


@case
def an_operator_without_a_shape_function() -> Case:
    @torch.library.custom_op("cppass_error_tests::shapeless", mutates_args=())
    def shapeless(x: Tensor) -> Tensor:
        return x + 1

    return after(lambda logits, ids: shapeless(logits))


@case
def an_operator_whose_shape_function_is_not_implemented() -> Case:
    @torch.library.custom_op("cppass_error_tests::unfinished", mutates_args=())
    def unfinished(x: Tensor) -> Tensor:
        return x + 1

    @unfinished.register_fake
    def _(x: Tensor) -> Tensor:
        raise NotImplementedError("not written yet")

    return after(lambda logits, ids: unfinished(logits))


@case
def an_operator_that_fails() -> Case:
    @torch.library.custom_op("cppass_error_tests::failing", mutates_args=())
    def failing(x: Tensor) -> Tensor:
        raise ArithmeticError("no such luck")

    failing.register_fake(lambda x: torch.empty_like(x))
    return after(lambda logits, ids: failing(logits))


@case
def a_flash_attention_that_writes_its_result() -> Case:
    """As serving engines register theirs: no result, an output that is an argument."""

    @torch.library.custom_op("cppass_error_tests::unified_attention_with_output", mutates_args=("out",))
    def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        out.copy_(functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    class Writing(Tiny):
        def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            out = torch.empty_like(q)
            attend(q, k, v, out)
            return out

    return Case(Writing(), on(token_ids(1, 16)))
