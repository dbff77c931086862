from datetime import UTC, datetime

import pytest
from plugin_objects import PEPPER, exchange, services
from pydantic import ValidationError

from gateway import Principal, Unauthenticated
from gateway.kit import hash_key, new_key
from gateway_plugins import api_keys

KEY = new_key()
HASH = hash_key(KEY, PEPPER)


def plugin(*entries, bootstrap_key_hash=None, **config):
    return api_keys.Plugin(api_keys.Config(keys=entries, **config), services(bootstrap_key_hash))


async def who(plugin, bearer=None, api_key=None):
    return await plugin.authenticate(exchange(bearer=bearer, api_key=api_key))


def mistake(**config):
    with pytest.raises(ValidationError) as caught:
        api_keys.Config.model_validate(config)
    return str(caught.value)


async def test_a_known_key_is_its_entry():
    """A key that the configuration lists by its hash is let in as what its entry says."""
    entry = {
        "id": "app", "hash": HASH, "tenant": "acme", "team": "blue", "roles": ["bot"], "name": "The app", "admin": True,
        "models": ["openai/*"], "aliases": "smart", "tasks": [], "endpoints": ["chat/*"], "limits": {"rpm": 3},
    }  # fmt: skip
    found = await who(plugin(entry), KEY)
    assert found.id == "app"
    assert (found.tenant, found.team, found.roles, found.admin) == ("acme", "blue", {"bot"}, True)
    assert found.claims == {"name": "The app"}
    assert found.limits == {"rpm": 3}
    assert found.scopes.allows("models", "openai/gpt-5")
    assert not found.scopes.allows("models", "anthropic/claude-opus-4.5")
    assert (found.scopes.aliases, found.scopes.tasks, found.scopes.endpoints) == (("smart",), (), ("chat/*",))


async def test_an_entry_alone_is_a_tenant_of_its_own_with_every_model():
    """Without `tenant` two keys don't see each other's data; without scopes a key may use everything."""
    found = await who(plugin({"id": "app", "hash": HASH}), KEY)
    assert found == Principal(id="app", tenant="app")


async def test_both_headers_are_understood():
    """OpenAI's clients send `Authorization: Bearer`, Anthropic's `x-api-key`: both work, and bearer counts first."""
    keys = plugin({"id": "app", "hash": HASH})
    assert (await who(keys, KEY)).id == "app"
    assert (await who(keys, api_key=KEY)).id == "app"
    assert (await who(keys, KEY, "something else")).id == "app"
    assert await who(keys, "something else", KEY) is None


async def test_no_key_is_nobody():
    """A request without a key is nobody's, which the core answers with 401."""
    keys = plugin({"id": "app", "hash": HASH})
    assert await who(keys) is None
    assert await who(keys, "", "") is None


async def test_a_foreign_token_is_left_to_others():
    """A token that doesn't look like ours (a JWT, whatever bytes) may be another plugin's, and breaks nothing."""
    keys = plugin({"id": "app", "hash": HASH})
    for token in ("eyJhbGciOi.eyJzdWIi.c2ln", "sk-proj-abc", "schlüssel", "\udcff\udc00", "x" * 100_000):
        assert await who(keys, token) is None


@pytest.mark.parametrize(
    "token",
    [KEY[:-1], KEY + "x", KEY[:20] + ("a" if KEY[20] != "a" else "b") + KEY[21:]],
    ids=["cut short", "too long", "mistyped"],  # the key is random: each test process would name its tests otherwise
)
async def test_a_typo_is_named_as_one(token):
    """A key of ours that was cut short or mistyped is told so, which an unknown one is not."""
    with pytest.raises(Unauthenticated, match="typo") as caught:
        await who(plugin({"id": "app", "hash": HASH}), token)
    assert caught.value.status_code == 401
    assert token not in caught.value.message


async def test_an_unknown_key_of_ours_is_refused():
    """A well-formed key that nobody listed is refused at once, whatever plugins follow."""
    with pytest.raises(Unauthenticated, match="not known") as caught:
        await who(plugin({"id": "app", "hash": HASH}), new_key())
    assert caught.value.error_code == "invalid_api_key"


async def test_an_expired_key_is_told_so():
    """An expired key gets an answer of its own, so that nobody looks for a typo."""
    with pytest.raises(Unauthenticated, match="expired") as caught:
        await who(plugin({"id": "app", "hash": HASH, "expires": "2020-01-31"}), KEY)
    assert caught.value.error_code == "expired_api_key"
    assert caught.value.status_code == 401


@pytest.mark.parametrize(
    "text, until",
    [
        ("2030-01-31", "2030-02-01T00:00:00+00:00"),
        ("2030-01-31T12:00:00", "2030-01-31T12:00:00+00:00"),
        ("2030-01-31T12:00:00+02:00", "2030-01-31T12:00:00+02:00"),
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00+00:00"),
    ],
)
async def test_a_date_is_good_until_its_end(text, until):
    """`expires: 2030-01-31` lets the key work through that day (UTC); a time is meant to the second."""
    config = api_keys.Config(keys=({"id": "app", "hash": HASH, "expires": text},))
    assert config.keys[0].expires.isoformat() == until
    assert (await who(api_keys.Plugin(config, services()), KEY)).id == "app"


async def test_a_key_that_is_in_use_expires_all_the_same(monkeypatch):
    """A key that was accepted a moment ago is refused from its end on, and still nobody else's key is taken for it."""
    keys = plugin({"id": "app", "hash": HASH, "expires": "2030-01-31T12:00:00Z"})
    monkeypatch.setattr(api_keys.time, "time", lambda: datetime(2030, 1, 31, 11, 59, tzinfo=UTC).timestamp())
    for _ in range(2):
        assert (await who(keys, KEY)).id == "app"
    with pytest.raises(Unauthenticated, match="not known"):
        await who(keys, new_key())
    monkeypatch.setattr(api_keys.time, "time", lambda: datetime(2030, 1, 31, 12, 0, tzinfo=UTC).timestamp())
    with pytest.raises(Unauthenticated, match="expired"):
        await who(keys, KEY)


async def test_a_key_from_the_environment(monkeypatch):
    """`env` names a variable that holds the key itself, ours or one that was made elsewhere."""
    monkeypatch.setenv("APP_KEY", KEY + "\n")
    monkeypatch.setenv("OLD_KEY", "sk-made-by-another-gateway-0123456789")
    keys = plugin({"id": "app", "env": "APP_KEY"}, {"id": "old", "env": "OLD_KEY"})
    assert (await who(keys, KEY)).id == "app"
    assert (await who(keys, "sk-made-by-another-gateway-0123456789")).id == "old"


async def test_a_key_from_a_file_that_the_environment_names(monkeypatch, tmp_path):
    """As containers' secrets are given: `APP_KEY_FILE` names the file; one that is not there is said to be missing."""
    (tmp_path / "key").write_text(KEY + "\n")
    monkeypatch.setenv("APP_KEY_FILE", str(tmp_path / "key"))
    assert (await who(plugin({"id": "app", "env": "APP_KEY"}), KEY)).id == "app"
    monkeypatch.setenv("APP_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ValidationError, match="the file that APP_KEY_FILE names can't be read"):
        plugin({"id": "app", "env": "APP_KEY"})


async def test_the_bootstrap_key_is_an_administrator():
    """The key that is printed at the first start works, until `bootstrap: false` or the server's own switch."""
    found = await who(plugin(bootstrap_key_hash=HASH), KEY)
    assert found == Principal(id="bootstrap", tenant="default", admin=True)
    off = plugin({"id": "app", "hash": hash_key(new_key(), PEPPER)}, bootstrap_key_hash=HASH, bootstrap=False)
    with pytest.raises(Unauthenticated):
        await who(off, KEY)
    with pytest.raises(Unauthenticated):
        await who(plugin(bootstrap_key_hash=None), KEY)


async def test_a_job_gets_its_principal_back_while_the_key_lasts():
    """A job that runs later has its owner's rights; a key that was removed or has expired since has none."""
    keys = plugin(
        {"id": "app", "hash": HASH}, {"id": "old", "hash": hash_key(new_key(), PEPPER), "expires": "2020-01-31"}
    )
    found = await who(keys, KEY)
    assert await keys.restore_principal(found.reference, None) == found
    assert await keys.restore_principal("key:old", None) is None
    assert await keys.restore_principal("key:removed", None) is None
    assert await keys.restore_principal("jwt:app", None) is None


async def test_explain_says_which_key():
    keys = plugin({"id": "app", "hash": HASH, "team": "blue", "admin": True, "expires": "2030-01-31"})
    asked = exchange(principal=await who(keys, KEY))
    assert await keys.explain(asked) == ["key app: tenant app, team blue, admin, expires 2030-02-01 00:00 UTC"]
    assert await keys.explain(exchange(principal=Principal(id="app", kind="jwt"))) is None


OTHER = "hmac-sha256:" + "0" * 64


@pytest.mark.parametrize(
    "config, words",
    [
        ({"keys": [{"id": "a"}]}, "needs either hash or env"),
        ({"keys": [{"id": "a", "hash": HASH, "env": "PRESENT"}]}, "needs either hash or env"),
        ({"keys": [{"id": "a", "env": "ABSENT"}]}, "the environment variable ABSENT is not set"),
        ({"keys": [{"id": "a", "env": "EMPTY"}]}, "the environment variable EMPTY is not set"),
        ({"keys": [{"id": "a", "env": "TYPO"}]}, "the key in TYPO has a typo"),
        ({"keys": [{"id": "a", "env": "SHORT"}]}, "must be 20 or more printable ASCII characters"),
        ({"keys": [{"id": "a", "hash": KEY}]}, "is not a key's hash"),
        ({"keys": [{"id": "a", "hash": HASH}, {"id": "a", "hash": OTHER}]}, "the same id"),
        ({"keys": [{"id": "a", "hash": HASH}, {"id": "b", "hash": HASH}]}, "the same hash: 'a' and 'b'"),
        ({"keys": [{"id": "a", "env": "PRESENT"}, {"id": "b", "env": "TWIN"}]}, "the same key: 'a' and 'b'"),
        ({"keys": [{"id": "bootstrap", "hash": HASH}]}, "bootstrap key's"),
        ({"keys": [{"id": "a", "hash": HASH, "expires": "soon"}]}, "is not an ISO date"),
        ({"keys": [{"id": "a", "hash": HASH, "expires": 1893456000}]}, "must be an ISO date"),
        ({"keys": [{"id": "a b", "hash": HASH}]}, "pattern"),
        ({"keys": [{"id": "a", "hash": HASH, "model": ["x"]}]}, "not permitted"),
        ({"bootstrap": False}, "accepts nobody"),
    ],
)
def test_mistakes_are_named_without_secrets(config, words, monkeypatch):
    """Every mistake in the list of keys is a start-up error that says what is wrong, and never quotes a key."""
    monkeypatch.delenv("ABSENT", raising=False)
    key = new_key()
    secrets = {"PRESENT": key, "TWIN": key, "TYPO": key[:-1], "SHORT": "sk-short", "EMPTY": " "}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    text = mistake(**config)
    assert words in text
    for secret in (KEY, key, key[:-1], "sk-short"):
        assert secret not in text


def test_one_key_can_not_be_two(monkeypatch):
    """The same key by its hash and by its variable would be two owners of one secret: the start is refused."""
    monkeypatch.setenv("APP_KEY", KEY)
    with pytest.raises(ValueError, match="'b' and 'a' are the same key"):
        plugin({"id": "a", "hash": HASH}, {"id": "b", "env": "APP_KEY"})
    with pytest.raises(ValueError, match="'bootstrap' and 'a' are the same key"):
        plugin({"id": "a", "hash": HASH}, bootstrap_key_hash=HASH)
