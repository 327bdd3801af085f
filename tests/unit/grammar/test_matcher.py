"""A matcher follows one answer: masks, forced tokens, drafts, forks, ends."""

import json

import pytest
from grammar_rig import VOCAB_SIZE, allowed, compiler, encode, request, spec, start, tokenizer, walk

from penstock.engine.grammar import matcher as matcher_file
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.engine.grammar.matcher import start_matcher
from penstock.models.embedded_model import embedded_path

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "is_grown_up": {"type": "boolean"}},
    "required": ["name", "is_grown_up"],
    "additionalProperties": False,
}
EOS_IDS = set(tokenizer().eos_token_ids)


def spell(token_ids):
    return b"".join(tokenizer().token_bytes(token_id) for token_id in token_ids).decode()


def test_a_mask_allows_what_can_be_accepted_and_nothing_else():
    matcher = start("regex", "(cat|car)s?")
    walk(matcher, "ca")
    (here,) = allowed(matcher)
    assert here == {i for i in range(4096) if matcher.num_valid([i])}
    assert {spell([i]) for i in here} == {"t", "r", "ts", "rs"} & {spell([i]) for i in here}


def test_what_is_forced_is_the_only_token_allowed_and_is_the_models_own_spelling():
    matcher = start("json_schema", SCHEMA)
    walk(matcher, '{"name": "Bo')
    assert matcher.forced() == ()
    walk(matcher, '"')
    forced = matcher.forced()
    assert spell(forced) == ', "is_grown_up":'
    assert list(forced) == encode(spell(forced))
    for token_id in forced:
        assert allowed(matcher) == [{token_id}]
        matcher.accept(token_id)


@pytest.mark.parametrize("text", ["<|im_end|>", "</tool_call>", "a<tool_call>{"])
def test_forced_text_that_spells_a_special_token_is_written_in_plain_tokens(text):
    matcher = start(
        "json_schema",
        {
            "type": "object",
            "properties": {"x": {"const": text}},
            "required": ["x"],
            "additionalProperties": False,
        },
    )
    written = []
    while "}" not in spell(written):
        drawn = min(allowed(matcher)[0])
        matcher.accept(drawn)
        forced = matcher.forced()
        for token_id in forced:
            matcher.accept(token_id)
        written += [drawn, *forced]
        assert matcher.failure is None
    assert json.loads(spell(written)) == {"x": text}


def test_masks_after_drafts_are_those_of_the_walk_and_the_state_stays():
    matcher, walked = start("json_schema", SCHEMA), start("json_schema", SCHEMA)
    drafts = tuple(encode('{"name": "Bo", "is'))
    assert matcher.num_valid(drafts) == len(drafts)
    rows = allowed(matcher, drafts=drafts)
    for depth, token_id in enumerate(drafts):
        assert allowed(walked) == [rows[depth]]
        walked.accept(token_id)
    assert allowed(walked) == [rows[-1]]
    assert allowed(matcher) == [rows[0]]
    assert matcher.failure is None


def test_drafts_are_valid_up_to_the_first_that_is_not():
    drafts = [*encode('{"name"'), *encode("}")]
    assert start("json_schema", SCHEMA).num_valid(drafts) == len(drafts) - 1


def test_a_draft_may_complete_the_answer():
    matcher = start("choice", ["yes", "no"])
    drafts = tuple(encode("yes"))
    assert allowed(matcher, drafts=drafts)[-1] == EOS_IDS
    assert not matcher.is_complete
    assert matcher.failure is None


def test_an_end_among_the_drafts_leaves_the_state_as_it_was():
    matcher = start("regex", r"ab+\.")
    walk(matcher, "ab")
    before = allowed(matcher)
    drafts = (*encode("b."), tokenizer().eos_token_ids[0])
    assert allowed(matcher, drafts=drafts[: matcher.num_valid(drafts)])[0] == before[0]
    assert allowed(matcher) == before
    assert walk(matcher, "b")
    assert matcher.failure is None


def test_a_whole_answer_is_complete_and_one_that_may_go_on_is_not():
    matcher = start("choice", ["yes", "yesterday"])
    walk(matcher, "yes")
    assert matcher.may_end
    assert not matcher.is_complete
    walk(matcher, "terday")
    assert matcher.may_end
    assert matcher.is_complete


def test_the_end_is_allowed_where_the_answer_may_end():
    matcher = start("regex", "[0-9]+")
    assert not EOS_IDS & allowed(matcher)[0]
    walk(matcher, "1")
    assert allowed(matcher)[0] >= EOS_IDS


def test_with_ignore_eos_the_end_comes_only_where_nothing_else_may():
    matcher = start("regex", "[0-9]{1,2}", ignore_eos=True)
    walk(matcher, "1")
    here = allowed(matcher)[0]
    assert here
    assert not EOS_IDS & here
    walk(matcher, "2")
    assert allowed(matcher)[0] == EOS_IDS


def test_a_fork_goes_its_own_way():
    matcher = start("regex", "(ab|ac)+")
    walk(matcher, "a")
    fork = matcher.fork()
    walk(matcher, "b")
    assert not matcher.num_valid(encode("c"))
    assert fork.num_valid(encode("c"))


def test_a_token_that_was_not_allowed_is_a_failure_for_good():
    matcher = start("regex", "a")
    matcher.accept(encode("b")[0])
    assert matcher.failure is not None
    assert not matcher.is_complete
    assert not matcher.may_end


def test_a_grammar_that_has_failed_is_compiled_anew_for_the_next_request():
    matcher = start("regex", "fails once")
    assert compiler().cached(spec("regex", "fails once")) is not None
    matcher.fork().accept(encode("b")[0])
    assert compiler().cached(spec("regex", "fails once")) is None


def test_an_ambiguous_grammar_ends_by_what_its_parser_counts_before_its_masks_cost_others_much():
    """The limit is of items, so that it is the same on every machine: with twice as many a mask takes 27 ms."""
    matcher = start("grammar", "start: s\ns: s s | s s s | /[a-z]/ | ")
    (letter,) = encode("a")
    for _ in range(50):
        allowed(matcher)
        if matcher.failure is not None:
            break
        matcher.accept(letter)
    assert "too complex for its limits" in matcher.failure


def test_an_answer_whose_masks_take_too_much_cpu_time_fails_and_one_within_its_time_does_not(monkeypatch):
    matcher = start("regex", "[a-z]+")
    allowed(matcher)
    assert matcher.failure is None
    monkeypatch.setattr(matcher_file, "CPU_PER_MASK_S", -1.0)
    allowed(matcher)
    assert "CPU time" in matcher.failure


def test_lexer_states_that_an_answer_derives_are_charged_to_its_grammar(monkeypatch):
    monkeypatch.setattr(matcher_file, "SLOW_MASK_CPU_S", 0.0)
    own = GrammarCompiler(embedded_path())
    grammar = spec("regex", "(.*[a-m].{12})+z")
    compiled = own.compile(grammar)
    before = own.num_bytes
    matcher = start_matcher(compiled, request(grammar), vocab_size=VOCAB_SIZE)
    for token_id in encode("many letters, each of which may be the first of twelve"):
        allowed(matcher)
        matcher.accept(token_id)
    assert matcher.failure is None
    assert own.num_bytes > before
    assert own.cached(grammar).num_bytes == own.num_bytes


def test_an_ambiguous_grammar_fails_within_its_fuel():
    matcher = start("grammar", "start: (start start start)+ | /[a-z]/ | (start start)+")
    for token_id in encode("there") * 30:
        allowed(matcher)
        matcher.accept(token_id)
    assert "too complex" in matcher.failure


def test_a_special_token_is_never_text():
    matcher = start("regex", r"(.|\n)*")
    special = {i for i in range(4096) if tokenizer().is_special(i)} - EOS_IDS
    assert not special & allowed(matcher)[0]
