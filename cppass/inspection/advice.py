"""What a refusal means, for somebody who meets it for the first time. The way out is in the refusal itself."""

from __future__ import annotations

from cppass.errors import Refusal

ATTENTION = (
    "Attention is the one place where rows of different ranks meet. The pass rewrites the forms that it can read "
    "exactly, and refuses the others: sharding them by guess would give wrong numbers."
)

MEANING = {
    "CP101": ATTENTION,
    "CP102": "Dropout draws random numbers, and ranks would draw other ones than one device. Inference needs none.",
    "CP103": f"{ATTENTION} This one has shapes or options that are not among them.",
    "CP104": "The log-sum-exp of an attention is computed per half here, so it is not there as an output of its own.",
    "CP105": "One forward has one set of sequences, which the ranks share. This graph attends over two.",
    "CP107": "A branch or loop may run on some ranks and not on others; a collective inside would then hang the group.",
    "CP109": "The lengths of the packed sequences say where each one ends; they do not fit the rows that are there.",
    "CP110": "The op is known, this feature of it is not implemented.",
    "CP111": "The op writes the KV cache and does something else at once: its rows cannot be gathered in between.",
    "CP112": "The ranks that share a sequence hold different rows; the model's own collective would mix them.",
    "CP113": "With inputs='sharded' every row needs a slot of its own, to which it is written as it comes.",
    "CP114": "The bucket that the runner planned is too small for this step.",
    "CP201": f"{ATTENTION} This product of two token-dependent values is no form it knows.",
    "CP202": "strict=True asks for nothing but K, V and outputs to be gathered; this op needs whole inputs.",
    "CP203": "Random numbers would differ between the ranks and one device.",
    "CP302": "Lengths must follow from the sizes of the graph's inputs, so that every call can be laid out.",
    "CP310": "With inputs='sharded' nothing but K and V travels, and this op would need rows of other ranks.",
    "CP311": "With inputs='sharded' an input is either local rows or the same on every rank; this one is used as both.",
    "CP312": "This graph has attention, but none of its inputs was named as local rows.",
    "CP313": "Gathered rows and the slots they are written to must be as many.",
}

FALLBACK = "options={'on_refusal': 'fallback'}"
FALLBACK_EFFECT = "runs this graph whole on every rank, with a warning: right numbers, and no gain"


def meaning(refusal: Refusal) -> str:
    """Why the pass cares; "" for a code that is not here."""
    return MEANING.get(refusal.code, "")


def falls_back(refusal: Refusal) -> bool:
    """Whether on_refusal="fallback" is open: graphs of local rows cannot run whole."""
    return refusal.code not in ("CP113", "CP114", "CP310", "CP311", "CP312", "CP313")
