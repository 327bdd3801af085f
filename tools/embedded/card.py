"""Writes the model card from measured figures; its samples are chosen by seed, not by taste."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.embedded import data
from tools.embedded.checkpoint import read
from tools.embedded.evaluate import Loaded, load
from tools.embedded.instructions import EVAL_SEED, Conversation, evaluation_set

STORY_OPENINGS = (
    "Once upon a time there was",
    "The old woman opened the door and",
    "“Where are you going?” said the fox",
)
SAMPLE_SEEDS = (1, 2, 3)
NUM_STORY_TOKENS = 120
NUM_SAMPLED_QUESTIONS = 18
FRESH_SEED = EVAL_SEED + 9

TEXT = """# penstock-tales

The model that Penstock serves when none is named, and that its tests run on. It continues stories
in passable English and answers a few kinds of simple question. It is a toy of {millions:.1f} million
parameters: it knows nothing beyond its books and its generated questions, and must not be relied on.

## What it is

- Architecture: Llama ({layers} layers, hidden size {hidden}, {heads} query heads, {kv_heads} key-value
  heads of size {head_dim}, feed-forward {inner}, tied embeddings), bfloat16 safetensors.
- Context: 4,096 tokens, learnt on rows of 512 with rows of 2,048 and 4,096 mixed in.
- Tokenizer: byte-level BPE, {vocab:,} tokens, digits alone, no normalisation.
- Chat template: system, user, assistant and tool turns; tools and tool calls in the hermes form;
  a short `<think>` block when asked to think.

## Data

- 36 public-domain children's books (15 MB, {book_tokens:,} tokens), seen about {epochs:.1f} times. The
  book 03454.txt was kept for the perplexity below and never trained on.
- Rows of book passages that come twice in a row, half of them shuffled, to learn copying.
- Conversations made by `tools/embedded/instructions.py` from facts and templates: {conversations:,} of
  them, each seen once. Only the assistant's turns carried loss.

## Training

{tokens:.1f} million tokens in {steps:,} steps on two shared CPU cores ({hours:.1f} hours, pauses included),
Muon and AdamW, bfloat16 arithmetic on float32 weights. The share of books among the rows, the shares of
the kinds and the learning rate were changed by hand during the run, through `control.json`; another run
comes out alike, not identical. After its end the run was taken up once more from step {resumed:,}, with a
raised and again falling rate, rows of 1,024, longer records to repeat and more tools with made-up names; the
shipped weights are the mean of both ends, which answers better than either (`tools/embedded/average.py`).
The commands are in `tools/embedded/README.md`; the main one:

```
python -m tools.embedded.train --corpus ../shared/corpus --tokenizer build/tokenizer \\
    --work-dir build/run --processes 2 --finish-by HH:MM
```

## Figures

Perplexity per token on 03454.txt ({held_out_tokens:,} tokens, windows of 1,024, stride 512):

| model | perplexity |
| --- | --- |
| penstock-tales | {perplexity:.2f} |
| interpolated modified Kneser-Ney 5-gram, same books and tokenizer | {baseline:.2f} |
| ratio | {ratio:.3f} |

By place in a window of 4,096 tokens: {positions}.

The same in bfloat16 on Penstock's native kernels, and quantized while loading:

{quantized}

Exact greedy answers on {asked} generated questions whose wording or operands training never had
(seed {seed}):

{rates}

These questions and this book were also measured during the run, to decide the shares of the data and
whether to ship the mean, and the answers to sums were given their middle step during it. On 200 further
held-out questions that were asked once, after all of that (seed {fresh_seed}): {fresh_rate} exact.

Exact greedy answers to harder forms (`tools/embedded/hard.py`), all held out, asked with that seed too:

{hard}

## The draft

`draft/` is a second, smaller model with the same tokenizer, which foretells the first for speculative
decoding and is of no use by itself: Llama ({draft_layers} layers, hidden size {draft_hidden}, {draft_heads}
query heads, {draft_kv_heads} key-value head of size {draft_head_dim}, feed-forward {draft_inner}, tied
embeddings), {draft_millions:.2f} million parameters, {draft_megabytes:.2f} MB with its tokenizer. It was
distilled from the first, at last from the shipped weights, on {draft_tokens:.1f} million tokens: the data
above and what the first said itself, greedily and sampled.

How often the draft's likeliest token is the one that the model then says, over all places of held-out
answers; the probability that both share (at temperature 1, or that of the sampling); and the tokens that
one look of the model yields with drafts of a fixed length (`tools/embedded/agreement.py`):

{agreement}

## Samples

Stories, sampled at temperature 0.8 and top-p 0.95 with seeds {seeds}:

{stories}

The first {num_questions} questions of the evaluation set, answered greedily:

{answers}
"""


DRAFT_GROUPS = (
    "chat",
    "chat, records aside",
    "repeat",
    "long_repeat",
    "tools",
    "stories",
    "stories, sampled",
)
DRAFT_LENGTHS = ("2", "4", "8")


def _story_samples(loaded: Loaded) -> str:
    bos = loaded.tokenizer.bos_token
    blocks = []
    for seed, opening in zip(SAMPLE_SEEDS, STORY_OPENINGS, strict=True):
        text = loaded.generate(bos + opening, num_tokens=NUM_STORY_TOKENS, seed=seed)
        quoted = "\n".join(f"> {line}" for line in f"**{opening}** {text}".splitlines())
        blocks.append(f"Seed {seed}:\n\n{quoted}")
    return "\n\n".join(blocks)


def _answer_sample(loaded: Loaded, question: Conversation) -> str:
    text = loaded.generate(data.prompt_text(question), num_tokens=300)
    verdict = "exact" if text == question.expected else f"expected `{_flat(question.expected)}`"
    asked = question.messages[-2]["content"]
    return f"- `{_flat(asked)}`\n  → `{_flat(text)}` ({verdict})"


def _flat(text: str) -> str:
    return text.replace("\n", "⏎").replace("`", "'")


def _sizes(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The card's fields about shape and training. Any: numbers of several types."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = read(checkpoint)
    cursor = saved.progress["cursor"]
    return {
        "millions": sum(weight.numel() for weight in saved.weights.values()) / 1e6,
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "inner": config["intermediate_size"],
        "vocab": config["vocab_size"],
        "conversations": cursor["conversation"],
        "book_windows": cursor["book_window"],
        "tokens": saved.progress["num_tokens"] / 1e6,
        "steps": saved.progress["step"],
        "hours": saved.progress["seconds"] / 3600,
    }


def _measured(figures: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """The card's fields about quality. Any: JSON values."""
    rates = figures["questions"]
    places = figures["perplexity_by_position"].items()
    return {
        "perplexity": figures["perplexity"],
        "baseline": baseline["perplexity"],
        "ratio": figures["perplexity"] / baseline["perplexity"],
        "held_out_tokens": figures["held_out_tokens"],
        "book_tokens": baseline["training_tokens"],
        "positions": ", ".join(f"{place}: {value:.1f}" for place, value in places),
        "asked": rates["all"].partition("/")[2],
        "rates": "| kind | exact |\n| --- | --- |\n"
        + "\n".join(f"| {kind} | {rate} |" for kind, rate in rates.items()),
    }


def quantized_table(figures: dict[str, Any]) -> str:
    """The figures of `quantized.py` as a table. Any: JSON values."""
    rises = figures["against bfloat16"]
    rows = [f"| {name} | {value:.2f} | {rises[name]} |" for name, value in figures["perplexity"].items()]
    return "\n".join(["| weights | perplexity | |", "| --- | --- | --- |", *rows])


def hard_table(rates: dict[str, str]) -> str:
    """The figures of `hard.py` as a table."""
    return "\n".join(["| form | exact |", "| --- | --- |", *(f"| {n} | {r} |" for n, r in rates.items())])


def agreement_table(figures: dict[str, Any]) -> str:
    """The figures of `agreement.py` as a table. Any: JSON values."""
    lengths = " | ".join(f"{length} drafts" for length in DRAFT_LENGTHS)
    rows = [f"| answers | agrees | shared | {lengths} |", "| --- " * (3 + len(DRAFT_LENGTHS)) + "|"]
    for name in DRAFT_GROUPS:
        one = figures[name]
        rounds = " | ".join(f"{one['tokens_per_round'][length]:.2f}" for length in DRAFT_LENGTHS)
        rows.append(f"| {name} | {one['agreement']:.3f} | {one['overlap']:.3f} | {rounds} |")
    return "\n".join(rows)


def _draft_sizes(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The card's fields about the draft. Any: numbers of several types."""
    sizes = _sizes(folder, checkpoint)
    sizes["megabytes"] = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return {f"draft_{name}": value for name, value in sizes.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """JSON files with what was measured."""

    figures: Path
    baseline: Path
    fresh: Path
    quantized: Path
    hard: Path
    agreement: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """Checkpoints of both models."""

    model: Path
    draft: Path
    resumed: int  # the step from which the model's run was taken up again


def _read(path: Path) -> Any:  # Any: a JSON document
    return json.loads(path.read_text(encoding="utf-8"))


def write_card(folder: Path, *, runs: Runs, sources: Sources) -> None:
    """Write `MODEL_CARD.md` into the model folder; generates the samples, about half a minute."""
    loaded = load(folder)
    fields = _sizes(folder, runs.model) | _measured(_read(sources.figures), _read(sources.baseline))
    fields |= _draft_sizes(folder / "draft", runs.draft)
    fields["epochs"] = fields["book_windows"] * 512 / fields["book_tokens"]
    questions = evaluation_set()[:NUM_SAMPLED_QUESTIONS]
    text = TEXT.format(
        **fields,
        seed=EVAL_SEED,
        fresh_seed=FRESH_SEED,
        fresh_rate=_read(sources.fresh)["questions"]["all"],
        seeds=", ".join(map(str, SAMPLE_SEEDS)),
        stories=_story_samples(loaded),
        quantized=quantized_table(_read(sources.quantized)),
        hard=hard_table(_read(sources.hard)),
        agreement=agreement_table(_read(sources.agreement)),
        resumed=runs.resumed,
        num_questions=len(questions),
        answers="\n".join(_answer_sample(loaded, question) for question in questions),
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the card from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="JSON of evaluate.py")
    parser.add_argument("--baseline", type=Path, required=True, help="JSON of kneser_ney.py")
    parser.add_argument("--fresh", type=Path, required=True, help="JSON of evaluate.py at FRESH_SEED")
    parser.add_argument("--quantized", type=Path, required=True, help="JSON of quantized.py")
    parser.add_argument("--hard", type=Path, required=True, help="JSON of hard.py")
    parser.add_argument("--agreement", type=Path, required=True, help="JSON of agreement.py")
    parser.add_argument("--draft-checkpoint", type=Path, required=True)
    parser.add_argument("--resumed", type=int, required=True, help="step at which the run was taken up again")
    arguments = parser.parse_args()
    sources = Sources(
        figures=arguments.figures,
        baseline=arguments.baseline,
        fresh=arguments.fresh,
        quantized=arguments.quantized,
        hard=arguments.hard,
        agreement=arguments.agreement,
    )
    runs = Runs(model=arguments.checkpoint, draft=arguments.draft_checkpoint, resumed=arguments.resumed)
    write_card(arguments.model, runs=runs, sources=sources)


if __name__ == "__main__":
    main()
