"""What the embedded model itself says, as data for its draft: stories and answers to trained questions.

The prompts are openings of the training books, requests for stories and conversations of the training
split; the model answers through the offline API, greedily and sampled. One file holds prompts and answers.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from penstock import LLM, SamplingParams
from tools.embedded import data
from tools.embedded.instructions import Conversation, make_conversation
from tools.embedded.tokenizer import BOS, EOS, SPECIALS, TURN_END

STREAM_SEED = 31
OPENING_SHARE = 0.4
REQUEST_SHARE = 0.15
STORY_TOKENS = 300
ANSWER_TOKENS = 400
MAX_MODEL_LEN = 1536
SHARES = {
    "capital": 0.06,
    "arithmetic": 0.16,
    "spelling": 0.12,
    "json": 0.10,
    "tools": 0.10,
    "repeat": 0.10,
    "think": 0.12,
    "greeting": 0.04,
    "penstock": 0.04,
    "long_repeat": 0.08,
    "new_tools": 0.08,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt and how it is to be answered."""

    text: str
    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Ids of a prompt and of what the model said, its end-of-turn id included."""

    prompt: tuple[int, ...]
    said: tuple[int, ...]


def make_question(index: int, paragraphs: Sequence[str]) -> Question:
    """Question number `index`; the same arguments give the same one."""
    rng = random.Random(f"answers:{STREAM_SEED}:{index}")  # noqa: S311  # a data set, not a secret
    dice = rng.random()
    if dice < OPENING_SHARE:
        words = rng.choice(paragraphs).split(" ")[: rng.randint(3, 30)]
        temperature = rng.choice((0.0, 0.0, 0.5, 0.8, 1.0))
        return Question(text=BOS + " ".join(words), temperature=temperature, max_tokens=STORY_TOKENS)
    if dice < OPENING_SHARE + REQUEST_SHARE:
        text = data.prompt_text(data.make_story(rng, paragraphs))
        temperature = rng.choice((0.0, 0.0, 0.5, 0.8, 1.0))
        return Question(text=text, temperature=temperature, max_tokens=STORY_TOKENS)
    asked = make_conversation(STREAM_SEED, index, shares=SHARES)
    temperature = rng.choice((0.0, 0.0, 0.0, 1.0))
    return Question(text=data.prompt_text(asked), temperature=temperature, max_tokens=ANSWER_TOKENS)


def ask(llm: LLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[Answer]:
    """Answer all questions in one batch."""
    prompts = [tokenizer.encode(one.text, add_special_tokens=False).ids for one in questions]
    params = [
        SamplingParams(temperature=one.temperature, max_tokens=one.max_tokens, seed=number)
        for number, one in enumerate(questions)
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    answers = []
    for ids, output in zip(prompts, outputs, strict=True):
        said = list(output.outputs[0].token_ids)
        ends = (SPECIALS.index(TURN_END), SPECIALS.index(EOS))
        if output.outputs[0].finish_reason == "stop" and (not said or said[-1] not in ends):
            said.append(SPECIALS.index(TURN_END))
        answers.append(Answer(prompt=tuple(ids), said=tuple(said)))
    return answers


def greedy_texts(folder: Path, asked: Sequence[Conversation], *, max_tokens: int) -> list[str]:
    """What the model of a folder says to the last turn of each conversation, spaces at the ends aside."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    questions = [
        Question(text=data.prompt_text(one), temperature=0.0, max_tokens=max_tokens) for one in asked
    ]
    with LLM(folder, max_num_seqs=64, max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        return [tokenizer.decode(list(one.said)).strip() for one in ask(llm, tokenizer, questions)]


def join(answers: Sequence[Answer]) -> data.Answers:
    """All answers end to end."""
    ids = [token for one in answers for token in (*one.prompt, *one.said)]
    has_loss = [flag for one in answers for flag in (*(False for _ in one.prompt), *(True for _ in one.said))]
    return data.Answers(ids=np.array(ids, dtype=np.int32), has_loss=np.array(has_loss, dtype=np.bool_))


def main() -> None:
    """Collect answers from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first question")
    parser.add_argument("--count", type=int, default=4000)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    paragraphs = data.load_paragraphs(arguments.corpus)
    numbers = range(arguments.first, arguments.first + arguments.count)
    with LLM(arguments.model, max_num_seqs=128, max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        answers = join(ask(llm, tokenizer, [make_question(number, paragraphs) for number in numbers]))
    answers.write(arguments.output)
    print(f"{arguments.output}: {answers.has_loss.sum()} tokens said of {len(answers.ids)}")


if __name__ == "__main__":
    main()
