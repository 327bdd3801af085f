"""`/score`, `/rerank` and `/classify` over a fake model whose score of a document is its length over 100."""

import pytest

from tests.fakes.http_server import bench

DOCUMENTS = ["bb", {"text": "cccc"}, "a", "dd"]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("q", "a", [("q", "a")]),
        ("q", ["a", "bb"], [("q", "a"), ("q", "bb")]),
        (["p", "q"], ["a", "bb"], [("p", "a"), ("q", "bb")]),
    ],
)
async def test_one_query_or_as_many_as_documents_are_scored_in_order(path, first, second, pairs):
    async with bench() as b:
        reply = await b.http.post(path, json={"text_1": first, "text_2": second, "instruction": "i"})
    body = reply.json()
    assert [(asked.query, asked.document) for asked in b.model.pooled] == pairs
    assert {asked.instruction for asked in b.model.pooled} == {"i"}
    assert [item["score"] for item in body["data"]] == [len(d) / 100 for _, d in pairs]
    assert [item["index"] for item in body["data"]] == list(range(len(pairs)))
    assert body["usage"]["prompt_tokens"] == sum(len(d) for _, d in pairs)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
async def test_documents_come_best_first_and_equal_ones_in_their_order(path):
    async with bench() as b:
        reply = await b.http.post(path, json={"query": "q", "documents": DOCUMENTS})
    results = reply.json()["results"]
    assert [item["index"] for item in results] == [1, 0, 3, 2]
    assert [item["relevance_score"] for item in results] == [0.04, 0.02, 0.02, 0.01]
    assert [item["document"]["text"] for item in results] == ["cccc", "bb", "dd", "a"]
    assert {asked.query for asked in b.model.pooled} == {"q"}


@pytest.mark.parametrize(("top_n", "count"), [(None, 4), (0, 4), (2, 2), (9, 4)])
async def test_top_n_cuts_and_documents_are_told_if_wanted(top_n, count):
    async with bench() as b:
        reply = await b.http.post(
            "/rerank",
            json={"query": "q", "documents": DOCUMENTS, "top_n": top_n, "return_documents": False},
        )
    results = reply.json()["results"]
    assert len(results) == count
    assert all(item["document"] is None for item in results)


async def test_classes_have_the_likeliest_label():
    async with bench() as b:
        reply = await b.http.post("/classify", json={"input": ["a", "b"]})
    (first, second) = reply.json()["data"]
    assert first == {"index": 0, "label": "yes", "probs": [0.25, 0.75], "num_classes": 2}
    assert second["index"] == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/score", {"text_1": "a"}, "text_2"),
        ("/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/score", {"text_1": "", "text_2": "b"}, "text_1"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": ["b"] * 1025}, "text_2"),
        ("/score", {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
        ("/rerank", {"query": "a"}, "documents"),
        ("/rerank", {"query": "", "documents": ["b"]}, "query"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b", ""]}, "documents.1"),
        ("/rerank", {"query": "a", "documents": [{"title": "b"}]}, "documents.0.text"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b"], "temperature": 0}, "temperature"),
        ("/classify", {"input": []}, "input"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(path, body, param):
    async with bench() as b:
        reply = await b.http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text
    assert b.model.pooled == []
