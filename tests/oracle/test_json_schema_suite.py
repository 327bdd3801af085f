"""The required tests of the JSON-Schema-Test-Suite, draft 2020-12: what is wrong is never accepted.

**Source:** json-schema-org/JSON-Schema-Test-Suite, tests/draft2020-12 (MIT, see the folder's LICENSE).
"""

from pathlib import Path

from benchmarks.json_schema_suite import run_suite
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.models.embedded_model import embedded_path
from penstock.text.tokenizer import Tokenizer

SUITE = Path(__file__).parents[1] / "data" / "json_schema_suite"


def test_the_suite() -> None:
    """No invalid instance passes; three quarters of the schemas compile and accept 95 % of what is valid."""
    counts = run_suite(SUITE, GrammarCompiler(embedded_path()), Tokenizer.from_folder(embedded_path()))
    assert counts.wrongly_accepted == []
    assert counts.invalid > 300
    assert counts.compiled >= 0.75 * counts.schemas
    assert counts.valid_accepted >= 0.95 * counts.valid
