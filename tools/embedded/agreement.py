"""How often the draft foretells the embedded model: by position, and as tokens for each look of the target.

The target answers held-out questions and goes on with the held-out book; the draft reads the same tokens and
is asked for the next one at every place of an answer. A draft of `k` tokens is accepted up to the first that
differs, and the target's own next token comes with it, so a round yields 1 to `k + 1` tokens.

**Source:** Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023), sections 2, 3.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from penstock import LLM
from tools.embedded import corpus
from tools.embedded.answers import MAX_MODEL_LEN, Answer, Question, ask
from tools.embedded.data import prompt_text
from tools.embedded.instructions import EVAL_SEED, HARD_KINDS, evaluation_set, make_conversation
from tools.embedded.model import LanguageModel
from tools.embedded.tokenizer import BOS
from tools.embedded.train_draft import DRAFT_CONFIG, load_target

DRAFT_LENGTHS = (1, 2, 3, 4, 5, 6, 8)
STORY_TOKENS = 128
NUM_STORIES = 40
NUM_HARD = 20  # of each kind
OPENING_WORDS = 25
SAMPLED_TEMPERATURE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """For each place of one answer: whether the draft's likeliest token came, and the shared probability."""

    came: tuple[bool, ...]
    overlap: tuple[float, ...]  # sum over tokens of the smaller of both probabilities


def tokens_per_round(came: Sequence[bool], draft_length: int) -> tuple[int, int]:
    """Tokens of an answer after its first, and the rounds they take with drafts of one length."""
    place, rounds = 1, 0
    while place < len(came):
        accepted = 0
        while accepted < draft_length and place + accepted < len(came) and came[place + accepted]:
            accepted += 1
        place += accepted + 1
        rounds += 1
    return max(0, len(came) - 1), rounds


def load_draft(folder: Path) -> LanguageModel:
    """The exported draft, in bfloat16."""
    draft = LanguageModel(DRAFT_CONFIG)
    draft.load_state_dict(load_file(folder / "model.safetensors"))
    return draft.bfloat16().requires_grad_(requires_grad=False)


def said_logits(model: LanguageModel, answer: Answer) -> Tensor:
    """Scores at each place of the answer, `[said, vocabulary]` float32."""
    ids = torch.tensor([(*answer.prompt, *answer.said)])
    logits: Tensor = model(ids)[0, len(answer.prompt) - 1 : -1]
    return logits.float()


def foretell(draft: LanguageModel, target: LanguageModel, answer: Answer, *, temperature: float) -> Foretold:
    """Compare draft and target over one answer; `temperature` is that of the shared probability."""
    ours, theirs = said_logits(draft, answer), said_logits(target, answer)
    came = ours.argmax(-1) == torch.tensor(answer.said)
    shared = torch.minimum((ours / temperature).softmax(-1), (theirs / temperature).softmax(-1)).sum(-1)
    return Foretold(came=tuple(came.tolist()), overlap=tuple(shared.tolist()))


def figures(answers: Sequence[Foretold]) -> dict[str, object]:
    """Rates over all places of all answers."""
    came = [flag for one in answers for flag in one.came]
    overlap = [share for one in answers for share in one.overlap]
    rounds = {}
    for length in DRAFT_LENGTHS:
        counted = [tokens_per_round(one.came, length) for one in answers]
        tokens, steps = (sum(column) for column in zip(*counted, strict=True))
        rounds[str(length)] = tokens / max(1, steps)
    return {
        "answers": len(answers),
        "places": len(came),
        "agreement": sum(came) / len(came),
        "overlap": sum(overlap) / len(overlap),
        "tokens_per_round": rounds,
    }


def held_out_questions() -> dict[str, list[Question]]:
    """The evaluation questions, and harder ones, by kind."""
    asked = evaluation_set()
    for kind in HARD_KINDS:
        asked += [make_conversation(EVAL_SEED, n, split="eval", kind=kind) for n in range(NUM_HARD)]
    groups: dict[str, list[Question]] = {}
    for one in asked:
        question = Question(text=prompt_text(one), temperature=0.0, max_tokens=400)
        groups.setdefault(one.kind, []).append(question)
    return groups


def story_questions(corpus_dir: Path, *, temperature: float) -> list[Question]:
    """Openings of paragraphs of the held-out book."""
    lines = [line for line in corpus.held_out_book(corpus_dir).splitlines() if len(line) > 200]
    openings = [" ".join(line.split(" ")[:OPENING_WORDS]) for line in lines[:: len(lines) // NUM_STORIES]]
    return [
        Question(text=BOS + text, temperature=temperature, max_tokens=STORY_TOKENS)
        for text in openings[:NUM_STORIES]
    ]


def collect(model: Path, groups: dict[str, list[Question]]) -> dict[str, list[Answer]]:
    """What the target says to every question, greedily or sampled as each asks."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with LLM(model, max_num_seqs=64, max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        return {name: ask(llm, tokenizer, questions) for name, questions in groups.items()}


@torch.inference_mode()
def main() -> None:
    """Measure from the command line; prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--draft", type=Path, help="default: `draft` in the model's folder")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    groups = held_out_questions()
    chat = tuple(groups)
    groups["stories"] = story_questions(arguments.corpus, temperature=0.0)
    groups["stories, sampled"] = story_questions(arguments.corpus, temperature=SAMPLED_TEMPERATURE)
    answers = collect(arguments.model, groups)
    draft = load_draft(arguments.draft or arguments.model / "draft")
    target = load_target(arguments.model)
    measured = {
        name: [
            foretell(draft, target, one, temperature=groups[name][0].temperature or 1.0) for one in several
        ]
        for name, several in answers.items()
    }
    measured["chat"] = [one for name in chat for one in measured[name]]
    measured["chat, records aside"] = [one for name in chat if "repeat" not in name for one in measured[name]]
    text = json.dumps({name: figures(several) for name, several in measured.items()}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
