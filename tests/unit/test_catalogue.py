import asyncio
import json
import stat
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI
from openai.types import Model as OpenAIModel
from openrouter import OpenRouter
from openrouter.components import Model as OpenRouterModel
from openrouter.components import ModelsListResponse
from structlog.testing import capture_logs

from gateway.catalogue import BadModelsList, Catalogue, Price, Tier
from gateway.exchange import UNKNOWN_COST, UNKNOWN_USAGE, Cost, Source, Usage
from gateway.settings import CatalogueSettings

USD = 10**12
LONG = {"min_prompt_tokens": 200_000, "prompt": "0.000006", "completion": "0.0000225"}


def raw(model_id, *, prompt="0.000003", completion="0.000015", canonical=None, prices=(), **fields):
    """An item as OpenRouter's /models writes it."""
    return {
        "id": model_id,
        "canonical_slug": canonical or model_id,
        "name": f"The {model_id}",
        "created": 1_747_930_371,
        "context_length": 1_000_000,
        "architecture": {
            "modality": "text->text",
            "input_modalities": ["text"],
            "output_modalities": ["text"],
            "tokenizer": "Claude",
            "instruct_type": None,
        },
        "pricing": {"prompt": prompt, "completion": completion, **dict(prices)},
        "top_provider": {"context_length": 1_000_000, "max_completion_tokens": 64_000, "is_moderated": False},
        "per_request_limits": None,
        "supported_parameters": ["max_tokens", "tools"],
        "default_parameters": None,
        "supported_voices": None,
        "links": {"details": f"/api/v1/models/{model_id}/endpoints"},
        **fields,
    }


def body(*items):
    return json.dumps({"data": list(items), "total_count": len(items), "links": {"next": None}}).encode()


class Served:
    """An upstream's model list that the test can change, break and count."""

    def __init__(self, *bodies, **by_upstream):
        self.bodies = dict(by_upstream)
        if bodies:
            self.bodies["openrouter"] = bodies[0]
        self.calls = 0
        self.called = asyncio.Condition()

    async def __call__(self, upstream):
        async with self.called:
            self.calls += 1
            self.called.notify_all()
        answer = self.bodies.get(upstream)
        if answer is None:
            raise ConnectionRefusedError("nobody listens")
        return answer

    async def until(self, calls):
        async with self.called:
            await asyncio.wait_for(self.called.wait_for(lambda: self.calls >= calls), 10)


OFFLINE = Served()


def settings(refresh=0, **overrides):
    return CatalogueSettings.model_validate({"refresh": refresh, "overrides": overrides})


def catalogue(fetch=OFFLINE, cache_dir=None, *, kinds=None, refresh=0, default=None, overrides=None):
    kinds = kinds or {"openrouter": "openrouter"}
    return Catalogue(kinds, settings(refresh, **(overrides or {})), cache_dir, fetch, default=default)


def listed(*items, kind="openrouter", overrides=None):
    """A catalogue of exactly these models, and its upstream's name."""
    found = catalogue(Served(up=body(*items)), kinds={"up": kind}, overrides=overrides)
    asyncio.run(found.refresh("up"))
    return found


def everything(_model_id):
    return True


# --- prices ---------------------------------------------------------------------------------------


def test_single_tokens_add_up_exactly():
    """Three tokens of $0.0000001 cost 300,000 pico-USD, three times one of them: no fraction is lost."""
    found = listed(raw("a/b", prompt="0.0000001", completion="0.0000001"))
    one = found.cost("up", "a/b", Usage(1, 0))
    assert Cost(300_000, Source.CATALOGUE) == found.cost("up", "a/b", Usage(3, 0))
    assert found.cost("up", "a/b", Usage(3, 0)) == one + one + one


@pytest.mark.parametrize(
    "written, pico",
    [
        ("0.000003", 3_000_000),
        ("0.0000002574", 257_400),
        ("2e-7", 200_000),
        ("0.00000019999999999999998", 200_000),
        (0.0000001, 100_000),
        ("0", 0),
        ("1", USD),
        ("-1", None),
        ("-0.000001", None),
        ("3", None),
        ("NaN", None),
        ("Infinity", None),
        ("1e999999999", None),
        ("1e-999999999", 0),
        ("9" * 1000, None),
        ("cheap", None),
        ("", None),
        (True, None),
        (None, None),
        ([], None),
    ],
)
def test_a_price_is_exact_or_unknown(written, pico):
    """A price becomes whole pico-USD; what is negative, absurd or no number is unknown, never a wrong bill."""
    assert pico == listed(raw("a/b", prompt=written)).model("up", "a/b").price.input


def test_dearer_beyond_the_threshold():
    """A request with more than 200k input tokens pays the long-context price for all of its tokens."""
    found = listed(raw("a/b", prices={"overrides": [LONG], "input_cache_read": "0.0000003"}))
    assert found.cost("up", "a/b", Usage(200_000, 1)).pico_usd == 200_000 * 3_000_000 + 15_000_000
    assert found.cost("up", "a/b", Usage(200_001, 1)).pico_usd == 200_001 * 6_000_000 + 22_500_000
    # The tier names no cache price: it keeps the base's.
    assert found.cost("up", "a/b", Usage(200_001, 0, cache_read_tokens=200_001)).pico_usd == 200_001 * 300_000


def test_several_tiers():
    """Of the conditional prices that apply, the later wins for each kind of token; the rest keep the base."""
    tiers = [
        {"min_prompt_tokens": 100, "prompt": "0.000002", "completion": "0.000009"},
        {"min_prompt_tokens": 10, "prompt": "0.000001"},
        {"min_prompt_tokens": 5, "utc_start": 100, "utc_end": 400, "prompt": "0"},
        {"min_prompt_tokens": "many", "prompt": "0"},
        "nonsense",
    ]
    price = listed(raw("a/b", prices={"overrides": tiers})).model("up", "a/b").price
    assert (price.at(10).input, price.at(10).output) == (3_000_000, 15_000_000)
    assert (price.at(11).input, price.at(11).output) == (1_000_000, 15_000_000)
    assert (price.at(101).input, price.at(101).output) == (1_000_000, 9_000_000)
    assert [tier.min_input_tokens for tier in price.tiers] == [10, 100]


@pytest.mark.parametrize("overrides", ["soon", 7, {"min_prompt_tokens": 1}, None])
def test_unreadable_tiers(overrides):
    """Conditional prices in no form that we know leave the base price."""
    price = listed(raw("a/b", prices={"overrides": overrides})).model("up", "a/b").price
    assert (price.input, price.tiers) == (3_000_000, ())


def test_cached_and_reasoning_tokens():
    """Tokens read from and written to the upstream's cache, and reasoning, pay their own price, once."""
    own = {
        "input_cache_read": "0.0000003",
        "input_cache_write": "0.00000375",
        "internal_reasoning": "0.00002",
        "request": "0.01",
    }
    usage = Usage(100, 50, cache_read_tokens=60, cache_write_tokens=30, reasoning_tokens=20)
    expected = 10 * 3_000_000 + 60 * 300_000 + 30 * 3_750_000 + 30 * 15_000_000 + 20 * 20_000_000 + USD // 100
    assert expected == listed(raw("a/b", prices=own)).cost("up", "a/b", usage).pico_usd
    plain = 100 * 3_000_000 + 50 * 15_000_000
    assert plain == listed(raw("a/b")).cost("up", "a/b", usage).pico_usd
    zeros = {"input_cache_write": "0", "internal_reasoning": "0"}
    assert plain == listed(raw("a/b", prices=zeros)).cost("up", "a/b", usage).pico_usd


def test_unknown_stays_unknown():
    """Without a price or a count that matters the cost is unknown, never 0; what is free is known to be."""
    found = listed(
        raw("a/b"),
        raw("openrouter/auto", prompt="-1", completion="-1"),
        raw("a/embed", prompt="0.00000002", completion="0"),
        raw("a/gift", prompt="0", completion="0"),
        raw("a/rerank", prompt="0", completion="0", prices={"request": "0.002"}),
        raw("a/tiers", prompt="0", prices={"overrides": [LONG]}),
    )
    assert found.cost("up", "a/b", UNKNOWN_USAGE) == UNKNOWN_COST
    assert found.cost("up", "a/b", Usage(1, None)) == UNKNOWN_COST
    assert found.cost("up", "a/b", Usage(None, 1)) == UNKNOWN_COST
    assert found.cost("up", "a/tiers", Usage(None, 1)) == UNKNOWN_COST
    assert found.cost("up", "openrouter/auto", Usage(1, 1)) == UNKNOWN_COST
    assert found.cost("up", "a/unheard-of", Usage(1, 1)) == UNKNOWN_COST
    assert found.cost("nowhere", "a/b", Usage(1, 1)) == UNKNOWN_COST
    assert found.cost("up", "a/rerank", UNKNOWN_USAGE) == UNKNOWN_COST
    assert Cost(2 * 10**9, Source.CATALOGUE) == found.cost("up", "a/rerank", Usage(5, None))
    assert Cost(20_000, Source.CATALOGUE) == found.cost("up", "a/embed", Usage(1, None))
    assert Cost(0, Source.CATALOGUE) == found.cost("up", "a/gift", UNKNOWN_USAGE)


def test_estimated_tokens_make_an_estimate():
    """A cost is no surer than the count of tokens that it was made from."""
    usage = Usage(1, 1, source=Source.ESTIMATE)
    assert Cost(18_000_000, Source.ESTIMATE) == listed(raw("a/b")).cost("up", "a/b", usage)


rate = st.integers(0, 10**9)
maybe = st.none() | rate
flat = st.builds(Price, rate, rate, maybe, maybe, maybe)


@st.composite
def usages(draw):
    """Usage that adds up: cached tokens are input, reasoning is output."""
    read, write, fresh, thought, said = (draw(st.integers(0, 10**6)) for _ in range(5))
    return Usage(read + write + fresh, thought + said, read, write, thought, Source.UPSTREAM)


@given(flat, usages(), usages())
def test_cost_is_additive(price, one, other):
    """Two requests cost together what they cost apart, to the pico-USD."""
    assert price.charge(one) + price.charge(other) == price.charge(one + other)


@given(flat, rate, rate, usages(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_cost_is_monotone(price, threshold, surcharge, usage, more_in, more_out):
    """More tokens never cost less, also across a tier."""
    dearer = Price(*(None if p is None else p + surcharge for p in (price.input, price.output)))
    dear = Price(
        dearer.input,
        dearer.output,
        *(None if p is None else p + surcharge for p in (price.cache_read, price.cache_write, price.reasoning)),
    )
    tiered = Price(
        price.input,
        price.output,
        price.cache_read,
        price.cache_write,
        price.reasoning,
        tiers=(Tier(threshold % 10**6, dear),),
    )
    more = Usage(
        usage.input_tokens + more_in,
        usage.output_tokens + more_out,
        usage.cache_read_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )
    assert tiered.charge(usage) <= tiered.charge(more)


@given(st.builds(Usage, *[st.none() | st.integers(0, 10**9)] * 5), flat)
def test_contradictory_counts_never_pay_us(usage, price):
    """An upstream that reports more cached or reasoning tokens than tokens can't make a cost negative."""
    cost = price.charge(usage)
    assert cost is None or cost >= 0


# --- names ----------------------------------------------------------------------------------------


def test_names_of_a_model():
    """A model answers to its id, its canonical slug, its family alias, and each with any variant."""
    found = listed(
        raw("a/opus-4.5", canonical="a/4.5-opus-2025"),
        raw(
            "~a/opus-latest",
            canonical="a/4.5-opus-2025",
            prompt="-1",
            alias_target={"name": "Opus", "slug": "a/opus-4.5"},
        ),
        raw("~a/lost-latest", alias_target={"name": "Lost", "slug": "a/gone"}),
    )
    names = ["a/opus-4.5", "a/4.5-opus-2025", "~a/opus-latest", "a/opus-4.5:nitro", "~a/opus-latest:floor"]
    assert {"a/opus-4.5"} == {found.model("up", name).id for name in names}
    assert found.model("up", "~a/lost-latest").id == "~a/lost-latest"
    assert found.model("up", "a/opus") is None
    assert found.model("up", ":nitro") is None


def test_a_variant_has_its_own_price():
    """A variant that the upstream lists has its own limits and price, and never lends them to its base."""
    found = listed(
        raw("a/b:thinking", prompt="0.000009"),
        raw("a/b"),
        raw("c/d:free", canonical="c/d-2025", prompt="0", completion="0"),
    )
    assert found.model("up", "a/b:thinking").price.input == 9_000_000
    assert found.model("up", "a/b").price.input == 3_000_000
    assert found.model("up", "a/b:thinking:nitro").price.input == 9_000_000
    assert found.model("up", "c/d") is None
    assert found.model("up", "c/d-2025") is None
    assert found.model("up", "c/d-2025:free").id == "c/d:free"


def test_free_is_free():
    """A `:free` variant that is not listed costs nothing, whatever its base does."""
    found = listed(raw("a/b"), raw("c/d"), raw("c/d:free", prompt="0.000001"))
    assert Cost(0, Source.CATALOGUE) == found.cost("up", "a/b:free", Usage(10, 10))
    assert found.cost("up", "c/d:free", Usage(1, 0)).pico_usd == 1_000_000
    assert found.cost("up", "a/b:freeform", Usage(1, 0)).pico_usd == 3_000_000


def test_a_colon_is_part_of_other_servers_names():
    """`llama3:70b` is no variant of `llama3`."""
    found = listed(
        {"id": "llama3", "object": "model", "created": 1, "owned_by": "library"},
        kind="openai",
        overrides={"llama3:70b": {"input": 1}},
    )
    assert found.model("up", "llama3:8b") is None
    assert found.model("up", "llama3:70b").name == "llama3:70b"


# --- the operator's word --------------------------------------------------------------------------


def test_overrides_win():
    """The operator's prices and limits replace the upstream's, under every name of the model and in every tier."""
    found = listed(
        raw("a/b", canonical="a/b-2025", prices={"overrides": [LONG], "internal_reasoning": "0.00001"}),
        raw("~a/latest", alias_target={"name": "b", "slug": "a/b"}),
        overrides={"a/b": {"input": "0.15", "output": 1, "context_length": 1000, "max_output": 10}},
    )
    for name in ("a/b", "a/b-2025", "~a/latest", "a/b:nitro"):
        model = found.model("up", name)
        assert (model.origin, model.context_length, model.max_output) == ("override", 1000, 10)
        assert Cost(150_000 + 2 * 1_000_000, Source.CATALOGUE) == found.cost(
            "up", name, Usage(1, 2, reasoning_tokens=1)
        )
        assert found.cost("up", name, Usage(200_001, 0)).pico_usd == 150_000 * 200_001
    item = found.item("a/b")
    assert (item["pricing"]["prompt"], item["pricing"]["completion"]) == ("0.00000015", "0.000001")
    assert item["pricing"]["overrides"][0]["prompt"] == "0.00000015"
    assert (item["context_length"], item["top_provider"]["max_completion_tokens"]) == (1000, 10)
    OpenRouterModel.model_validate(item)


def test_an_override_of_some_prices_keeps_the_rest():
    """What the operator does not name stays the upstream's."""
    found = listed(raw("a/b"), overrides={"a/b": {"cache_read": "0.000001", "cache_write": 4}})
    price = found.model("up", "a/b").price
    assert (
        price.input,
        price.output,
        price.cache_read,
        price.cache_write,
    ) == (3_000_000, 15_000_000, 1, 4_000_000)
    assert (
        found.model("up", "a/b").context_length,
        found.model("up", "a/b").max_output,
    ) == (1_000_000, 64_000)


def test_an_override_adds_a_model():
    """A model that the upstream does not list can be added, also before the upstream was ever reached."""
    kinds = {"openrouter": "openrouter", "local": "openai"}
    found = catalogue(
        kinds=kinds,
        overrides={
            "qwen": {"upstream": "local", "input": 1, "output": 2},
            "a/new": {"input": Decimal("0.5"), "output": 3},
        },
    )
    found.load()
    assert found.cost("local", "qwen", Usage(1, 1)).pico_usd == 3_000_000
    assert found.cost("openrouter", "a/new", Usage(1, 1)).pico_usd == 3_500_000
    assert found.model("openrouter", "qwen") is None
    assert found.status()["local"] == {
        "kind": "openai",
        "origin": "override",
        "as_of": None,
        "models": 1,
        "error": None,
    }


def test_overrides_without_an_upstream_belong_to_the_default():
    """An override that names no upstream is the default upstream's."""
    kinds = {"local": "openai", "openrouter": "openrouter"}
    found = catalogue(kinds=kinds, default="openrouter", overrides={"a/new": {"input": 1}})
    found.load()
    assert found.model("openrouter", "a/new").origin == "override"
    assert found.model("local", "a/new") is None


def test_an_override_of_a_variant_starts_from_its_base():
    """An override for a variant alone leaves the base as it is."""
    found = listed(raw("a/b"), overrides={"a/b:floor": {"input": 1}})
    floor = found.model("up", "a/b:floor")
    assert (floor.price.input, floor.price.output, floor.context_length) == (1_000_000, 15_000_000, 1_000_000)
    assert found.model("up", "a/b").price.input == 3_000_000


# --- starting, refreshing, the copy on disk -------------------------------------------------------


async def test_offline_start():
    """A start without any network knows models, prices and limits from the dated snapshot in the package."""
    found = catalogue()
    assert found.item("anthropic/claude-opus-4.5") is None  # nothing was read in __init__
    async with found.lifespan():
        model = found.model("openrouter", "anthropic/claude-opus-4.5")
        assert (
            model.price.input,
            model.price.output,
            model.price.cache_read,
            model.price.cache_write,
        ) == (5_000_000, 25_000_000, 500_000, 6_250_000)
        assert (model.context_length, model.max_output, model.origin) == (200_000, 64_000, "bundled")
        status = found.status()["openrouter"]
        assert status["origin"] == "bundled"
        assert status["as_of"].startswith("20")
        assert status["models"] > 10


def test_another_servers_catalogue_starts_empty():
    """The snapshot is OpenRouter's: a server of another kind has no models until it was asked."""
    found = catalogue(kinds={"local": "openai"})
    found.load()
    assert found.model("local", "openai/gpt-4o") is None
    assert found.status()["local"] == {
        "kind": "openai",
        "origin": None,
        "as_of": None,
        "models": 0,
        "error": None,
    }


async def test_a_copy_outlives_a_restart(tmp_path):
    """What was fetched is there at the next start, offline; only we can read the file."""
    cache = tmp_path / "cache"
    first = catalogue(Served(body(raw("a/b"))), cache)
    first.load()
    assert await first.refresh("openrouter") == 1
    assert first.model("openrouter", "openai/gpt-4o") is None  # the snapshot is gone
    again = catalogue(cache_dir=cache)
    again.load()
    assert again.model("openrouter", "a/b").origin == "cache"
    assert first.status()["openrouter"]["as_of"] == again.status()["openrouter"]["as_of"]
    (file,) = cache.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\x00\xff",
        b"[]",
        b"null",
        b'{"kind": "openrouter", "data": []}',
        b'{"kind": "openrouter", "data": [{"id": 1}]}',
        b'{"kind": "openai", "data": [{"id": "a/b"}]}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_copy_is_ignored(tmp_path, content):
    """A damaged copy is named in one warning, and the snapshot stands in for it."""
    (tmp_path / "models-openrouter.json").write_bytes(content)
    found = catalogue(cache_dir=tmp_path)
    with capture_logs() as logs:
        found.load()
    assert [line["event"] for line in logs] == ["catalogue_cache_ignored"]
    assert found.status()["openrouter"]["origin"] == "bundled"


async def test_a_directory_that_can_not_be_written(tmp_path):
    """A cache directory that can't be written costs a warning, not the refresh."""
    (tmp_path / "file").write_text("")
    found = catalogue(Served(body(raw("a/b"))), tmp_path / "file" / "cache")
    with capture_logs() as logs:
        await found.refresh("openrouter")
    assert [line["event"] for line in logs] == ["catalogue_cache_not_written"]
    assert found.model("openrouter", "a/b").origin == "upstream"


async def test_a_write_that_fails_leaves_no_trace(tmp_path):
    """A copy that can't be put in place leaves no half file behind."""
    (tmp_path / "models-openrouter.json").mkdir()
    with capture_logs():
        await catalogue(Served(body(raw("a/b"))), tmp_path).refresh("openrouter")
    assert [path.name for path in tmp_path.iterdir()] == ["models-openrouter.json"]


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"<html>Bad gateway</html>",
        b'{"error": {"code": 401, "message": "No auth"}}',
        b'{"data": []}',
        b'{"data": {"a": 1}}',
        b'{"data": [1, {"id": ""}, {"id": "a\\nb"}]}',
        b'{"data": [{"id": "a/b"}, {}, {}]}',
        b'"data"',
        b"[" * 100_000,
    ],
)
async def test_a_bad_reply_is_refused(tmp_path, reply):
    """A reply that is not a list of models changes nothing: not the models, not the copy on disk."""
    served = Served(body(raw("a/b")))
    found = catalogue(served, tmp_path)
    await found.refresh("openrouter")
    kept = (tmp_path / "models-openrouter.json").read_bytes()
    served.bodies["openrouter"] = reply
    with pytest.raises(BadModelsList):
        await found.refresh("openrouter")
    assert found.model("openrouter", "a/b").origin == "upstream"
    assert kept == (tmp_path / "models-openrouter.json").read_bytes()
    assert found.status()["openrouter"]["error"].startswith("BadModelsList: ")
    served.bodies["openrouter"] = body(raw("c/d"))
    await found.refresh("openrouter")
    assert found.status()["openrouter"]["error"] is None
    assert found.model("openrouter", "a/b") is None


async def test_a_few_unreadable_entries_are_left_out():
    """One entry that is no model does not cost the list, and the first of two with one id counts."""
    found = catalogue(Served(body(raw("a/b"), raw("a/b", prompt="0"), {"name": "?"}, raw("c/d"))))
    assert await found.refresh("openrouter") == 2
    assert found.model("openrouter", "a/b").price.input == 3_000_000


async def test_kept_fresh_in_the_background():
    """The list is fetched at the start and again and again, without anybody asking."""
    served = Served(body(raw("a/b")))
    found = catalogue(served, refresh=0.01)
    async with found.lifespan():
        await served.until(2)
        assert found.model("openrouter", "a/b").origin == "upstream"
        served.bodies["openrouter"] = body(raw("c/d"))
        await served.until(served.calls + 2)
        assert found.model("openrouter", "c/d") is not None
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("catalogue")]


async def test_an_outage_is_said_once():
    """While the upstream is away it is tried again, the old models stay and the log has one line of it."""
    served = Served()
    found = catalogue(served, refresh=0.01)
    with capture_logs() as logs:
        async with found.lifespan():
            await served.until(4)
            assert found.status()["openrouter"]["origin"] == "bundled"
            assert found.status()["openrouter"]["error"] == "ConnectionRefusedError: nobody listens"
            served.bodies["openrouter"] = body(raw("a/b"))
            await served.until(served.calls + 2)
            assert found.status()["openrouter"]["origin"] == "upstream"
    warnings = [line for line in logs if line["log_level"] == "warning"]
    assert warnings == [
        {
            "event": "catalogue_refresh_failed",
            "upstream": "openrouter",
            "error": "ConnectionRefusedError: nobody listens",
            "log_level": "warning",
        }
    ]


async def test_never_refreshed():
    """`refresh: 0` never asks an upstream."""
    served = Served(body(raw("a/b")))
    async with catalogue(served).lifespan():
        assert len(asyncio.all_tasks()) == 1
    assert served.calls == 0


async def test_two_workers_share_a_directory(tmp_path):
    """Workers that write one copy at the same time leave a whole one."""
    workers = [catalogue(Served(body(*[raw(f"w{i}/m{j}") for j in range(50)])), tmp_path) for i in range(4)]
    await asyncio.gather(*(worker.refresh("openrouter") for worker in workers))
    reader = catalogue(cache_dir=tmp_path)
    reader.load()
    assert tuple(reader.status()["openrouter"][key] for key in ("origin", "models")) == ("cache", 50)
    assert [path.name for path in tmp_path.iterdir()] == ["models-openrouter.json"]


# --- other settings while it runs -----------------------------------------------------------------


async def test_other_settings_are_followed():
    """What was fetched stays, under the new overrides; new upstreams come, those that are gone are still priced."""
    served = Served(body(raw("a/b"), raw("a/c")), local=body({"id": "mine"}))
    found = catalogue(
        served, kinds={"openrouter": "openrouter", "old": "openai"}, overrides={"x/y": {"input": 1, "upstream": "old"}}
    )
    found.load()
    await found.refresh("openrouter")
    kinds = {"openrouter": "openrouter", "local": "openai"}
    put_in_force = found.follow(kinds, settings(0, **{"a/b": {"input": 7}}))
    assert found.model("openrouter", "a/b").price.input == 3 * 10**6
    put_in_force()
    assert found.model("openrouter", "a/b").price.input == 7 * 10**6
    assert found.model("openrouter", "a/c").origin == "upstream"
    assert list(found.status()) == ["openrouter", "local"]
    assert found.model("old", "x/y").price.input == 10**6
    assert found.item("x/y") is None
    assert "x/y" not in [item["id"] for item in found.listing(everything)["data"]]
    assert served.calls == 1


async def test_what_is_fetched_while_settings_change_is_kept():
    """A list that came between the preparation and the change is newer than what was prepared."""
    served = Served(body(raw("a/b")))
    found = catalogue(served)
    await found.refresh("openrouter")
    put_in_force = found.follow({"openrouter": "openrouter"}, settings(0, **{"c/d": {"input": 7}}))
    served.bodies["openrouter"] = body(raw("a/b"), raw("c/d"))
    await found.refresh("openrouter")
    put_in_force()
    assert found.status()["openrouter"]["models"] == 2
    assert found.model("openrouter", "c/d").price.input == 7 * 10**6


async def test_another_upstream_is_fetched_at_once():
    """With a reload the lists are fetched anew: the address behind a name may be another."""
    served = Served(body(raw("a/b")), local=body({"id": "mine"}))
    found = catalogue(served, refresh=0.01)
    async with found.lifespan():
        await served.until(1)
        found.follow({"local": "openai"}, settings(0.01))()
        await served.until(served.calls + 2)
        assert found.model("local", "mine").origin == "upstream"
        assert list(found.status()) == ["local"]
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("catalogue")]


# --- GET /v1/models -------------------------------------------------------------------------------

KINDS = {"openrouter": "openrouter", "local": "openai"}


async def two_upstreams(**options):
    local = {
        "object": "list",
        "data": [
            {
                "id": "qwen:8b",
                "object": "model",
                "created": 1.0,
                "owned_by": "library",
                "pricing": {"input": 3},
            },
            {"id": "plain", "max_model_len": 8192, "top_provider": "x", "created": "yesterday"},
            {"id": "a/b", "object": "model", "created": 1, "owned_by": "copycat"},
        ],
    }
    served = Served(
        body(raw("a/b", expiration_date="2026-11-24"), raw("~a/latest"), {"id": "x/bare", "pricing": "?"}),
        local=json.dumps(local).encode(),
    )
    found = catalogue(served, kinds=KINDS, **options)
    await found.refresh("openrouter")
    await found.refresh("local")
    return found


async def test_the_listing_satisfies_both_sdks():
    """Every item, also of a bare server, an override and an alias, is a model to OpenAI's and OpenRouter's SDKs."""
    found = await two_upstreams(overrides={"z/added": {"input": 1}, "a/b": {"output": 4}})
    listing = found.listing(everything, ["fast"])
    assert [item["id"] for item in listing["data"]] == [
        "fast",
        "a/b",
        "~a/latest",
        "x/bare",
        "z/added",
        "qwen:8b",
        "plain",
    ]
    assert (listing["object"], listing["total_count"], listing["links"]) == ("list", 7, {"next": None})
    ModelsListResponse.model_validate(listing)
    for item in listing["data"]:
        OpenAIModel.model_validate(item, strict=True)
    owners = {item["id"]: item["owned_by"] for item in listing["data"]}
    assert owners == {
        "fast": "xenios",
        "a/b": "a",
        "~a/latest": "a",
        "x/bare": "x",
        "z/added": "z",
        "qwen:8b": "library",
        "plain": "local",
    }
    assert json.loads(json.dumps(listing)) == listing


async def test_an_item_keeps_what_the_upstream_said():
    """OpenRouter's own fields stay; OpenAI's stand beside them, its name for the last day too."""
    item = (await two_upstreams()).item("a/b")
    assert raw("a/b", expiration_date="2026-11-24") == {key: item[key] for key in raw("a/b", expiration_date="")}
    assert (item["object"], item["owned_by"], item["shutdown_date"]) == ("model", "a", "2026-11-24")


async def test_other_servers_limits_but_not_their_prices():
    """Of an OpenAI-compatible server we read the context length; its prices are in units that we don't know."""
    found = await two_upstreams()
    assert found.model("local", "plain").context_length == 8192
    assert (Price(), 1) == (found.model("local", "qwen:8b").price, found.model("local", "qwen:8b").created)
    assert found.item("qwen:8b")["pricing"] == {"prompt": "-1", "completion": "-1"}


async def test_a_listing_shows_what_is_allowed():
    """A caller sees the models that it may use, and of two upstreams' equal ids the default's."""
    found = await two_upstreams(default="local")
    listing = found.listing(lambda model_id: model_id == "a/b")
    assert [item["owned_by"] for item in listing["data"]] == ["copycat"]
    assert listing["total_count"] == 1


async def test_one_item():
    """One model is found by any of its names, an alias before a model of that name; another is not found."""
    found = await two_upstreams()
    assert found.item("a/b:nitro")["id"] == "a/b"
    assert found.item("qwen:8b")["id"] == "qwen:8b"
    assert found.item("qwen:9b") is None
    assert found.item("fast") is None
    alias = found.item("fast", ["fast"])
    assert (alias["id"], alias["object"], alias["owned_by"]) == ("fast", "model", "xenios")
    assert found.item("a/b", {"a/b"})["owned_by"] == "xenios"


async def test_pages():
    """Page by page one gets each item once, and the last page says so."""
    found = await two_upstreams()
    first = found.listing(everything, offset=0, limit=3)
    second = found.listing(everything, offset=3, limit=3)
    assert first["links"]["next"] == "/api/v1/models?offset=3&limit=3"
    assert second["links"]["next"] is None
    assert 5 == first["total_count"] == second["total_count"]
    assert found.listing(everything)["data"] == first["data"] + second["data"]
    assert found.listing(everything, offset=99, limit=3)["data"] == []
    assert len(found.listing(everything, offset=-1, limit=0)["data"]) == 1


@asynccontextmanager
async def serving(found):
    """GET /v1/models and /api/v1/models of this catalogue on a real socket."""

    async def many(request):
        offset, limit = (request.query.get(name) for name in ("offset", "limit"))
        page = {"offset": int(offset or 0), "limit": int(limit) if limit else None}
        return web.json_response(found.listing(everything, **page))

    async def one(request):
        return web.json_response(found.item(request.match_info["id"]))

    app = web.Application()
    app.router.add_get("/v1/models", many)
    app.router.add_get("/api/v1/models", many)
    app.router.add_get("/v1/models/{id:.+}", one)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/")


# The blocking clients, in a thread: coverage's tracing on CPython 3.11 breaks anyio's connect, which the others use.


async def test_openais_client_reads_it():
    """An unmodified OpenAI client lists the snapshot's models and retrieves one whose id has a slash."""
    found = catalogue()
    found.load()

    def ask(url):
        with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return list(client.models.list()), client.models.retrieve("anthropic/claude-opus-4.5")

    async with serving(found) as url:
        models, one = await asyncio.to_thread(ask, url)
    assert found.status()["openrouter"]["models"] == len(models)
    assert (one.id, one.owned_by) == ("anthropic/claude-opus-4.5", "anthropic")
    assert one.shutdown_date == found.item(one.id).get("expiration_date")


async def test_openrouters_client_reads_it_to_the_end():
    """An unmodified OpenRouter client pages through more models than fit one page, and stops."""
    found = catalogue(Served(body(*[raw(f"a/m{i}") for i in range(25)])))
    await found.refresh("openrouter")

    def ask(url):
        seen = []
        with OpenRouter(api_key="none", server_url=f"{url}/api/v1") as client:
            page = client.models.list(limit=10)
            while page is not None:
                seen += [model.id for model in page.result.data]
                page = page.next()
        return seen

    async with serving(found) as url:
        seen = await asyncio.to_thread(ask, url)
    assert seen == [f"a/m{i}" for i in range(25)]


async def test_a_catalogue_reads_another_gateways_listing():
    """What one gateway lists, another reads as its upstream's list: the shape survives the round trip."""
    found = await two_upstreams(overrides={"a/b": {"input": 2}})
    async with serving(found) as url, ClientSession() as session:

        async def fetch(_upstream):
            async with session.get(f"{url}/v1/models") as reply:
                return await reply.read()

        second = catalogue(fetch)
        assert await second.refresh("openrouter") == 5
    assert found.model("openrouter", "a/b").price == second.model("openrouter", "a/b").price
