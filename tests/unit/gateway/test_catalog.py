"""The catalog: a name or an alias leads to a model, anything else to a list of what exists."""

import pytest

from penstock.core.errors import NotFoundError, NotReadyError, StartupError
from penstock.core.ids import ModelName
from penstock.gateway.catalog import MAX_NAMES, Catalog
from tests.fakes.model_client import FakeModelClient

A, B, C = ModelName("a"), ModelName("org/b-1.5"), ModelName("c")


def test_names_and_aliases_lead_to_their_model_and_the_first_is_the_default():
    first, second = FakeModelClient(name=A), FakeModelClient(name=B)
    catalog = Catalog()
    catalog.add(first, name=A)
    catalog.add(second, name=B, aliases=(C,))
    assert catalog.resolve(None) is first
    assert catalog.resolve(B) is second
    assert catalog.resolve(C) is second
    assert catalog.names == (A, B, C)


def test_an_alias_has_its_own_card_with_its_model_as_parent():
    catalog = Catalog()
    catalog.add(FakeModelClient(name=A), name=A, aliases=(C,))
    assert [(card.name, card.parent) for card in catalog.cards()] == [(A, None), (C, A)]


def test_an_unknown_name_lists_those_that_exist_and_does_not_repeat_the_question():
    catalog = Catalog()
    catalog.add(FakeModelClient(name=A), name=A, aliases=(C,))
    with pytest.raises(NotFoundError, match="it has: a, c") as caught:
        catalog.resolve(ModelName("zz\n"))
    assert caught.value.param == "model"
    assert "zz" not in caught.value.message


def test_an_empty_catalog_is_not_ready():
    with pytest.raises(NotReadyError):
        Catalog().resolve(None)
    assert Catalog().not_ready_reason == "loading"


def test_it_is_ready_when_every_model_is():
    catalog = Catalog()
    slow = FakeModelClient(name=C, not_ready="queue_full")
    catalog.add(FakeModelClient(name=A), name=A)
    catalog.add(slow, name=C)
    assert catalog.not_ready_reason == "c: queue_full"
    slow.not_ready = None
    assert catalog.not_ready_reason is None


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 129, "é", "-a", "a\n"])
def test_malformed_names_are_refused(name):
    with pytest.raises(StartupError, match="A-Za-z0-9"):
        Catalog().add(FakeModelClient(), name=ModelName(name))


def test_a_name_is_taken_once():
    catalog = Catalog()
    catalog.add(FakeModelClient(), name=A)
    with pytest.raises(StartupError, match="taken twice"):
        catalog.add(FakeModelClient(), name=B, aliases=(A,))
    assert catalog.names == (A,)


def test_the_number_of_names_is_bounded():
    catalog = Catalog()
    for index in range(MAX_NAMES):
        catalog.add(FakeModelClient(), name=ModelName(f"m{index}"))
    with pytest.raises(StartupError, match=str(MAX_NAMES)):
        catalog.add(FakeModelClient(), name=A)
