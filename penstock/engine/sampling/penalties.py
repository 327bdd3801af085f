"""Penalties on tokens that were seen, with the meaning they have in vLLM and OpenAI.

Each function changes the row it is given, in place; the sampler gives it a copy. The order is repetition,
then frequency and presence.
"""

from penstock.engine.sampling.vocabulary import Floats, Ints


def penalise_repetition(row: Floats, *, token_ids: Ints, penalty: float) -> None:
    """Make seen tokens less likely: positive logits are divided, the others multiplied.

    **Source:** Keskar et al., CTRL (2019), section 4.1; the case of negative logits as in transformers.

    Args:
        row: [vocab], changed in place.
        token_ids: ids in prompt and answer; repeated ids count once.
        penalty: greater than 0; above 1 discourages.
    """
    seen = row[token_ids]
    row[token_ids] = (seen / penalty).clip(min=0) + (seen * penalty).clip(max=0)


def penalise_presence_and_frequency(
    row: Floats, *, token_ids: Ints, counts: Floats, presence: float, frequency: float
) -> None:
    """Subtract `frequency` for each time a token was generated, and `presence` once.

    Args:
        row: [vocab], changed in place.
        token_ids: distinct ids in the answer.
        counts: how often each was generated, 1 or more.
        presence: -2 to 2.
        frequency: -2 to 2.
    """
    row[token_ids] -= counts * frequency + presence
