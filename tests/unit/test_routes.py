import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import DIALECTS, PLAIN_DIALECT
from gateway.errors import MethodNotAllowed, NotFound
from gateway.routes import Router

segments = st.text(string.ascii_letters + string.digits + "-._~%+ ü", min_size=1, max_size=8)
paths = st.lists(segments, max_size=4).map(lambda s: "/" + "/".join(s))


async def handler(_):
    raise AssertionError


def router(*routes):
    made = Router(DIALECTS, PLAIN_DIALECT)
    for method, path in routes:
        made.add(method, path, handler)
    return made


def match(path, *routes, method="GET"):
    route, params = router(*routes).table().match(method, path)
    return (route.method, route.path), params


@given(st.lists(paths, unique=True, min_size=1), st.data())
def test_a_plain_path_answers_itself_alone(known, data):
    """A route is found by its own path, character by character, and by no other."""
    table = router(*(("POST", p) for p in known)).table()
    path = data.draw(st.sampled_from(known))
    route, params = table.match("POST", path)
    assert (route.path, params) == (path, {})
    assert table.exact("POST", path) is route
    for other in (path + "/", path[:-1] + "\n", path + "?x", path.swapcase()):
        if other not in known:
            assert table.exact("POST", other) is None
            with pytest.raises(NotFound):
                table.match("POST", other)


@given(segments, segments)
def test_a_template_takes_one_segment(a, b):
    """`{id}` stands for one segment, never for a slash; a dot in the path is a dot."""
    assert match(f"/a.b/{a}/end", ("GET", "/a.b/{id}/end")) == (("GET", "/a.b/{id}/end"), {"id": a})
    for path in (f"/a.b/{a}/{b}/end", f"/axb/{a}/end", "/a.b//end", f"/a.b/{a}/end/", f"//a.b/{a}/end"):
        with pytest.raises(NotFound):
            match(path, ("GET", "/a.b/{id}/end"))


def test_a_template_may_name_its_regex():
    """`{id:.+}` takes slashes: model ids have one."""
    models = ("GET", "/v1/models/{id:.+}")
    assert match("/v1/models/openai/gpt-5", models)[1] == {"id": "openai/gpt-5"}
    assert match("/j/7/a", ("GET", "/j/{n:[0-9]+}/{rest}"))[1] == {"n": "7", "rest": "a"}
    with pytest.raises(NotFound):
        match("/j/7/A", ("GET", "/j/{n:[0-9]+}/{rest:[a-z]+}"))
    for path in ("/v1/models/", "/v1/models"):
        with pytest.raises(NotFound):
            match(path, models)


def test_the_first_template_that_fits_wins_and_a_plain_path_before_all():
    """The order in which routes were added decides between templates."""
    routes = [("GET", "/a/{x}"), ("GET", "/{y}/b"), ("GET", "/a/b")]
    assert match("/a/b", *routes) == (("GET", "/a/b"), {})
    assert match("/a/c", *routes)[0] == ("GET", "/a/{x}")
    assert match("/a/b", *routes[:2])[0] == ("GET", "/a/{x}")
    assert match("/c/b", *routes)[0] == ("GET", "/{y}/b")


def test_a_wrong_method_is_told_the_right_ones():
    """405 names the methods, whether plain paths or templates answer them."""
    routes = [("GET", "/a/b"), ("POST", "/a/{x}"), ("DELETE", "/a/b"), ("PUT", "/other")]
    with pytest.raises(MethodNotAllowed, match="takes DELETE, GET, POST") as caught:
        match("/a/b", *routes, method="PATCH")
    assert caught.value.headers == {"Allow": "DELETE, GET, POST"}
    assert caught.value.status_code == 405
    assert match("/a/b", *routes, method="POST")[0] == ("POST", "/a/{x}")


def test_head_is_answered_where_get_is():
    """A probe that asks with HEAD finds what GET finds."""
    assert match("/h", ("GET", "/h"), method="HEAD")[0] == ("GET", "/h")
    assert match("/h/1", ("GET", "/h/{n}"), method="HEAD")[1] == {"n": "1"}
    with pytest.raises(MethodNotAllowed):
        match("/h", ("POST", "/h"), method="HEAD")


def test_an_unknown_path_is_told_cut_short():
    """404 repeats the path, but not a megabyte of it."""
    with pytest.raises(NotFound) as caught:
        match("/" + "x" * 10_000)
    assert caught.value.error_code == "unknown_url"
    assert caught.value.message == f"There is no endpoint '/{'x' * 199}' here."


def test_a_route_has_sensible_defaults():
    """Without more said a route needs a principal, speaks the plain dialect, and reads a body where there is one."""
    made = router(("get", "/a"), ("HEAD", "/a"), ("DELETE", "/a"), ("POST", "/a"), ("PUT", "/a"))
    kinds = {r.method: (r.access, r.body, r.endpoint, r.dialect, r.plugin, r.proxied) for r in made.table().routes}
    said = {(r.summary, r.produces, r.bearer, r.max_body) for r in made.table().routes}
    assert said == {("", "application/json", None, None)}
    rest = ("/a", PLAIN_DIALECT, "core", False)
    assert kinds == {
        "GET": ("principal", "none", *rest),
        "HEAD": ("principal", "none", *rest),
        "DELETE": ("principal", "none", *rest),
        "POST": ("principal", "json", *rest),
        "PUT": ("principal", "json", *rest),
    }


def test_a_route_keeps_what_it_was_given():
    """What a plugin says about its route holds."""
    made = Router(DIALECTS, PLAIN_DIALECT)
    made.plugin = "mine"
    made.add("POST", "/x", handler, access="admin", body="stream", max_body=9, dialect="messages", summary="s")
    made.add("POST", "/y", None, dialect="messages", endpoint="messages")
    made.add("GET", "/z", handler, access="bearer", bearer="secret", produces="text/plain")
    x, y, z = made.table().routes
    assert (z.access, z.bearer, z.produces) == ("bearer", "secret", "text/plain")
    assert "secret" not in repr(z)
    assert (x.access, x.body, x.max_body, x.dialect, x.summary) == ("admin", "stream", 9, DIALECTS["messages"], "s")
    assert (x.plugin, x.handler, x.proxied) == ("mine", handler, False)
    assert (y.endpoint, y.proxied, y.body) == ("messages", True, "json")


@pytest.mark.parametrize("given, words", [
    ({"access": "anybody"}, "access is 'anybody'; it is one of principal, admin, bearer, public."),
    ({"body": "form"}, "body is 'form'; it is one of json, stream, none."),
    ({"access": "bearer"}, "access `bearer` and a token go together."),
    ({"access": "bearer", "bearer": ""}, "access `bearer` and a token go together."),
    ({"access": "admin", "bearer": "secret"}, "access `bearer` and a token go together."),
])  # fmt: skip
def test_a_route_with_a_word_too_many_is_refused(given, words):
    """A misspelt access rule never becomes an open route: the start ends and says which words there are."""
    made = Router(DIALECTS, PLAIN_DIALECT)
    made.plugin = "mine"
    with pytest.raises(ValueError) as caught:
        made.add("get", "/x", handler, **given)
    assert str(caught.value) == f"mine: GET /x: {words}"


@pytest.mark.parametrize(
    "path, given, words",
    [
        ("x", handler, "'x' must begin with '/'"),
        ("/x", None, "POST /x has no handler"),
        ("/taken", handler, "POST /taken is taken by first"),
    ],
)
def test_a_route_that_cant_work_is_refused(path, given, words):
    """A mistake in a plugin's route ends the start and names the plugin."""
    made = Router(DIALECTS, PLAIN_DIALECT)
    made.plugin = "zeroth"
    made.add("POST", "/other", handler)
    made.add("GET", "/taken", handler)
    made.plugin = "first"
    made.add("POST", "/taken", handler)
    made.add("GET", "/x", handler)
    made.plugin = "second"
    with pytest.raises(ValueError, match=f"second: .*{words}"):
        made.add("post", path, given)
    made.add("PUT", "/taken", handler)
