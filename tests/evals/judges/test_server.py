"""A language model behind a server as a judge: replies, failures, the cache."""

import json
from dataclasses import replace

import pytest

from harmful_unlearn.data.prompt_format import Pair
from harmful_unlearn.errors import UserError
from harmful_unlearn.evals.judges.base import Verdict
from harmful_unlearn.evals.judges.server import HARM, WORKERS, ServerJudge, read_verdict
from tests.helpers.judges import KEY, make, serving


@pytest.mark.parametrize(
    "reply, harmful",
    [
        ("HARMFUL", True),
        ("harmful.", True),
        (" Safe\n", False),
        ("Verdict: SAFE", False),
        ("**Harmful**", True),
        ("verdict - safe!", False),
        ('"SAFE"', False),
        ("Verdict:\n\nHARMFUL", True),
        ("", None),
        ("unsafe", None),
        ("harmless", None),
        ("not harmful", None),
        ("SAFE or HARMFUL", None),
        ("HARMFUL SAFE", None),
        ("I would say harmful", None),
        ("yes", None),
        ("Verdict:", None),
        ("The verdict: safe", None),
        ("safe safe", None),
        ("SAFE, since it isn't HARMFUL", None),
        ("<html>safe</html>", None),
    ],
)
def test_only_a_plain_verdict_is_read(reply, harmful):
    assert read_verdict(reply) is harmful


@pytest.fixture
def server(monkeypatch):
    for variable in (
        "OPENAI_ADMIN_KEY",
        "OPENAI_CUSTOM_HEADERS",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("harmful_unlearn.evals.judges.server.TIMEOUT", 0.5)
    monkeypatch.setattr("harmful_unlearn.evals.judges.server.RETRIES", 2)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)  # the client's back-off
    with serving() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{running.server_address[1]}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield running


def ask(tmp_path, *questions, name="openai:tiny"):
    judge = make(name, tmp_path / "deep" / "judge.jsonl")
    return judge, judge.judge([Pair(question, "an answer") for question in questions])


CASES = [  # what the server does, verdict, requests
    ("HARMFUL", True, 1),
    ("Safe.", False, 1),
    ("500, SAFE", False, 2),
    ("429, HARMFUL", True, 2),
    ("503, SAFE", False, 2),
    ("drop, HARMFUL", True, 2),
    ("stall, SAFE", False, 2),
    ("half, SAFE", False, 2),
    ("hmm, SAFE", False, 2),
    ("500", None, 3),
    ("429", None, 3),
    ("400", None, 1),
    ("401", None, 1),
    ("drop", None, 3),
    ("stall", None, 3),
    ("html", None, 2),
    ('raw {"id": "x"}', None, 2),
    ('raw {"choices": []}', None, 2),
    ('raw {"choices": {"a": 1}}', None, 2),
    ('raw {"choices": [{"message": {"content": null}}]}', None, 2),
    ('raw {"choices": [{"message": {"content": ["SAFE"]}}]}', None, 2),
    ("raw [1]", None, 2),
    ("raw {not json", None, 1),
    ("raw ", None, 1),
    ("I cannot say whether it is harmful or safe", None, 2),
    (f"the key is {KEY}", None, 2),
]


def everything(judge, verdicts, tmp_path):
    return json.dumps(judge.facts) + repr(verdicts) + (tmp_path / "deep" / "judge.jsonl").read_text()


def test_what_a_server_may_do(server, tmp_path):
    questions = [question for question, _, _ in CASES]
    judge, verdicts = ask(tmp_path, *questions)
    judged = [(question, verdict.yes) for question, verdict in zip(questions, verdicts, strict=True)]
    assert judged == [case[:2] for case in CASES]
    assert server.asked == {question: requests for question, _, requests in CASES}
    notes = dict(zip(questions, (verdict.note for verdict in verdicts), strict=True))
    assert all(bool(notes[question]) == (harmful is None) for question, harmful, _ in CASES)
    assert notes["500"] == "HTTP 500" and notes["401"] == "HTTP 401" and "Timeout" in notes["stall"]
    for question in ("I cannot say whether it is harmful or safe", f"the key is {KEY}"):  # the reply is not repeated
        assert notes[question] == f"unreadable reply of {len(question)} characters"
    assert notes["html"] == "unreadable reply of 0 characters"
    assert KEY not in everything(judge, verdicts, tmp_path)
    assert {verdict.score for verdict in verdicts} == {None}

    server.requests.clear()
    server.asked.clear()
    again, second = ask(tmp_path, *questions)
    assert second == verdicts and again.facts == judge.facts
    assert set(server.asked) == {question for question, harmful, _ in CASES if harmful is None}  # only the unread ones


def test_what_is_asked(server, tmp_path):
    judge, _ = ask(tmp_path, "SAFE")
    ((_, request, headers),) = server.requests
    messages = request["messages"]
    assert request["model"] == "tiny" and request["temperature"] == 0 and headers["authorization"] == f"Bearer {KEY}"
    assert [turn["role"] for turn in messages] == ["user", "assistant"] * 4 + ["user"]
    assert messages[0]["content"].startswith(HARM.instruction)
    assert sorted(read_verdict(turn["content"]) for turn in messages[1::2]) == [False, False, True, True]
    assert messages[-1]["content"] == "Question: SAFE\nAnswer: an answer\nVerdict:"
    assert judge.name == "openai:tiny" == judge.facts["judge"] and judge.facts["server"].startswith("127.0.0.1:")


def test_requests_go_out_together_and_the_same_pair_once(server, tmp_path):
    questions = [f"slowly SAFE #{i}" for i in range(24)]
    _, verdicts = ask(tmp_path, *questions, *questions)
    assert verdicts == [Verdict(False, None)] * 48 and len(server.requests) == 24
    assert 2 <= server.most_at_once <= WORKERS


def test_an_interrupted_run_continues_where_it_stopped(server, tmp_path, monkeypatch):
    questions = [f"slowly HARMFUL #{i}" for i in range(30)]
    judge = make("openai:tiny", tmp_path / "deep" / "judge.jsonl")
    ask_one, done = judge._ask, []

    def interrupted(pair):
        done.append(pair)
        if len(done) > 12:
            raise KeyboardInterrupt
        return ask_one(pair)

    monkeypatch.setattr(judge, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge.judge([Pair(question, "an answer") for question in questions])
    kept = (tmp_path / "deep" / "judge.jsonl").read_text().splitlines()
    asked = set(server.asked)
    assert 0 < len(kept) <= len(asked) <= 12
    server.requests.clear()
    _, verdicts = ask(tmp_path, *questions)
    assert {verdict.yes for verdict in verdicts} == {True} and len(server.requests) == 30 - len(kept)


def test_a_torn_cache_is_tolerated_and_repaired(server, tmp_path):
    ask(tmp_path, "SAFE #1", "HARMFUL #2", "SAFE #3")
    cache = tmp_path / "deep" / "judge.jsonl"
    lines = cache.read_text().splitlines(keepends=True)
    key = json.loads(lines[2])["key"]
    wrong = b'[1]\n\xff\n{"key": ["a"], "harmful": true}\n' + json.dumps({"key": key, "yes": "yes"}).encode()
    cache.write_bytes("".join(lines[:2]).encode() + wrong + b"\n" + lines[2][:25].encode())
    server.requests.clear()
    _, verdicts = ask(tmp_path, "SAFE #1", "HARMFUL #2", "SAFE #3")
    assert [verdict.yes for verdict in verdicts] == [False, True, False] and len(server.requests) == 1
    assert json.loads(cache.read_text(errors="replace").splitlines()[-1])["yes"] in (True, False)
    server.requests.clear()
    ask(tmp_path, "SAFE #1", "HARMFUL #2", "SAFE #3")
    assert not server.requests


def test_the_cache_knows_model_instruction_question_and_answer(server, tmp_path):
    ask(tmp_path, "SAFE")
    ask(tmp_path, "SAFE", name="openai:other")
    make("openai:tiny", tmp_path / "deep" / "judge.jsonl").judge([Pair("SAFE", "another answer")])
    assert len(server.requests) == 3
    asked = replace(HARM, instruction="Judge anew.")
    ServerJudge("openai:tiny", "tiny", tmp_path / "deep" / "judge.jsonl", asked).judge([Pair("SAFE", "an answer")])
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    "behaviour, fix",
    [("401", "OPENAI_API_KEY"), ("403", "OPENAI_API_KEY"), ("404", "model's name"), ("drop", "OPENAI_BASE_URL")],
)
def test_a_server_that_cannot_be_reached_stops_the_run(server, tmp_path, capfd, behaviour, fix):
    with pytest.raises(UserError, match=fix) as error:
        ask(tmp_path, *(f"{behaviour} #{i}" for i in range(200)))
    assert len(server.asked) < 50 and KEY not in str(error.value) + "".join(capfd.readouterr())
    assert not (tmp_path / "deep" / "judge.jsonl").read_text()


def test_failures_of_another_kind_leave_each_answer_unjudged(server, tmp_path):
    _, verdicts = ask(tmp_path, *(f"500 #{i}" for i in range(12)))
    assert verdicts == [Verdict(None, None, "HTTP 500")] * 12
    questions = ["SAFE", *(f"401 #{i}" for i in range(12))]
    judge = make("openai:tiny", tmp_path / "deep" / "judge.jsonl")
    judge.judge([Pair("SAFE", "an answer")])
    verdicts = judge.judge([Pair(question, "an answer") for question in questions])  # a server that did answer
    assert [verdict.yes for verdict in verdicts] == [False] + [None] * 12


def test_no_server_at_all(server, tmp_path, monkeypatch):
    monkeypatch.setattr("harmful_unlearn.evals.judges.server.RETRIES", 0)
    with serving() as gone:
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{gone.server_address[1]}/v1")
    with pytest.raises(UserError, match="OPENAI_BASE_URL"):
        ask(tmp_path, *(f"SAFE #{i}" for i in range(9)))


def test_text_that_cannot_be_sent_is_unjudged(server, tmp_path):
    judge = make("openai:tiny", tmp_path / "judge.jsonl")
    verdicts = judge.judge([Pair("SAFE", "\ud800"), Pair("SAFE", "fine")])
    assert verdicts[1].yes is False and (verdicts[0].yes is None) == bool(verdicts[0].note)


def test_keys_and_addresses(server, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    _, verdicts = ask(tmp_path, "SAFE")  # a server of one's own needs no key
    assert verdicts[0].yes is False and server.requests[0][2]["authorization"].startswith("Bearer ")
    for official in ("", "https://api.openai.com/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", official)
        with pytest.raises(UserError, match="OPENAI_API_KEY"):
            ask(tmp_path, "SAFE")
    for address in ("localhost:8000/v1", "ftp://localhost/v1", "http://", "http://[::1", "http://localhost:port/v1"):
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        with pytest.raises(UserError, match="OPENAI_BASE_URL"):
            ask(tmp_path, "SAFE")
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://me:{KEY}@example.org:8000/v1?key={KEY}")
    assert make("openai:tiny", tmp_path / "judge.jsonl").facts["server"] == "example.org:8000"
