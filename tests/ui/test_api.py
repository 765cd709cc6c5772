"""The contract of every endpoint, against a served page: gradio_client, plain HTTP and MCP."""

import base64
import io
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import page_server
import pytest
import requests
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError, ValidationError
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from PIL import Image

from fluxsae.runs.folder import RunFolder
from fluxsae.steering.edits import Recipe, SteeringEdit
from fluxsae.ui.kit.snippets import tool_name

ENDPOINTS = {
    "/heatmap", "/read_picture", "/features_at", "/explain", "/search_features", "/feature", "/directions", "/steer",
    "/sweep", "/compare", "/swap", "/silence", "/layers",
}  # fmt: skip
PROMPT = "a large red circle on a black background"
REFUSALS = (ValidationError, AppError)


@pytest.fixture(scope="module")
def client(served: page_server.Page, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client(served.url, verbose=False, download_files=str(tmp_path_factory.mktemp("files")))


@pytest.fixture(scope="module")
def place(client: Client) -> str:
    """The default hook point."""
    return parameters(client, "/heatmap")["hookpoint"]["parameter_default"]


@pytest.fixture(scope="module")
def best(client: Client, place: str) -> dict[str, Any]:
    """The most meaningful feature."""
    return client.predict(query="", hookpoint=place, limit=1, api_name="/search_features")[0]


def parameters(client: Client, name: str) -> dict[str, Any]:
    info = client.view_api(return_format="dict", print_info=False)["named_endpoints"][name]
    return {parameter["parameter_name"]: parameter for parameter in info["parameters"]}


def test_the_guide_s_call_of_the_page_runs(served: page_server.Page, capsys: pytest.CaptureFixture[str]) -> None:
    guide = (page_server.ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "gradio_client" in part)
    exec(code.replace("http://127.0.0.1:7860", served.url), {})
    assert len(capsys.readouterr().out.strip().splitlines()) >= 5


def test_exactly_the_named_endpoints_are_offered(client: Client) -> None:
    info = client.view_api(return_format="dict", print_info=False)
    assert set(info["named_endpoints"]) == ENDPOINTS
    assert list(parameters(client, "/heatmap")) == [
        "prompt",
        "hookpoint",
        "seed",
        "num_inference_steps",
        "step",
        "limit",
        "run",
    ]
    assert list(parameters(client, "/sweep")) == [
        "prompt", "hookpoint", "feature", "mode", "strengths", "steps", "region", "seed", "num_inference_steps",
        "run",
    ]  # fmt: skip
    for name in ENDPOINTS:
        assert all(entry["type"].get("description") for entry in parameters(client, name).values()), name


def test_an_argument_is_called_required_where_a_call_without_it_is_refused(client: Client) -> None:
    required = {
        name: {key for key, value in parameters(client, name).items() if not value["parameter_has_default"]}
        for name in ENDPOINTS
    }
    assert required == {
        "/heatmap": {"prompt"},
        "/read_picture": {"picture"},
        "/features_at": {"prompt", "row", "column"},
        "/explain": {"prompt", "feature"},
        "/search_features": set(),
        "/feature": {"feature"},
        "/directions": {"feature"},
        "/steer": {"prompt", "edits"},
        "/sweep": {"prompt", "feature", "strengths"},
        "/compare": {"prompt", "other"},
        "/swap": {"prompt", "old", "new"},
        "/silence": {"feature"},
        "/layers": set(),
    }


def test_view_api_tells_what_an_edit_is(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.view_api()
    line = next(line for line in capsys.readouterr().out.splitlines() if "] edits:" in line)
    for words in ("hookpoint: str", "feature: int", "strength: float", "Literal['scale'", "steps: list[int] | None"):
        assert words in line
    example = json.loads(line.partition("Example: ")[2].rpartition("]")[0] + "]")
    assert not SteeringEdit.from_dict(example[0]).is_identity


def test_heatmap_gives_an_image_ranked_features_and_their_overlays(client: Client, place: str) -> None:
    image, features, overlays = client.predict(prompt=PROMPT, limit=4, api_name="/heatmap")
    assert Image.open(image).size == (128, 128)
    assert len(features) == len(overlays) == 4
    assert [feature["score"] for feature in features] == sorted((f["score"] for f in features), reverse=True)
    assert all(feature["hookpoint"] == place and 0 < feature["relative"] <= 1 for feature in features)
    pictures = [Image.open(entry["image"]) for entry in overlays]
    assert {picture.size for picture in pictures} == {(512, 512)}
    assert len({picture.tobytes() for picture in pictures}) > 1  # two features may fire alike on one patch
    assert f"feature {features[0]['feature']}" in overlays[0]["caption"]


def test_the_same_request_gives_the_same_answer_and_another_seed_another(client: Client) -> None:
    first, again, other = (client.predict(prompt=PROMPT, seed=seed, api_name="/heatmap") for seed in (0, 0, 1))
    assert Image.open(first[0]).tobytes() == Image.open(again[0]).tobytes() != Image.open(other[0]).tobytes()
    assert first[1] == again[1]


def test_features_at_a_patch_are_features_of_the_image(client: Client) -> None:
    features = client.predict(prompt=PROMPT, row=4, column=4, limit=5, api_name="/features_at")
    assert features
    everything = {feature["feature"] for feature in client.predict(prompt=PROMPT, limit=100, api_name="/heatmap")[1]}
    assert {feature["feature"] for feature in features[:3]} <= everything


def as_data_url(path: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def test_an_own_picture_is_read_from_a_file_or_a_data_url_and_leaves_no_file(
    client: Client, served: page_server.Page, place: str
) -> None:
    painted, _, _ = client.predict(prompt=PROMPT, limit=1, api_name="/heatmap")
    features, overlays, familiarity = client.predict(picture=handle_file(painted), limit=5, api_name="/read_picture")
    assert len(features) == len(overlays) == 5
    assert all(feature["hookpoint"] == place for feature in features)
    assert not familiarity["is_unlike"]
    url = as_data_url(painted)
    assert client.predict(picture=url, limit=5, api_name="/read_picture")[0] == features
    at_patch = client.predict(prompt="", picture=url, row=4, column=4, limit=3, api_name="/features_at")
    assert at_patch
    why = client.predict(prompt="", picture=url, feature=features[0]["feature"], limit=1, api_name="/explain")
    assert why["words"] == []
    before, _, facts = client.predict(prompt="", edits=[], picture=url, change=0.3, api_name="/steer")
    assert Image.open(before).size == (128, 128)
    assert facts["recipe"] is None
    name = Path(painted).name
    kept = [path for path in (served.log.parent / "files").rglob("*") if path.is_file() and path.name == name]
    digests = {path.read_bytes() for path in kept if "uploads" in str(path)}
    assert not digests


def test_explain_gives_words_and_named_earlier_features_by_effect(client: Client, place: str) -> None:
    features = client.predict(prompt=PROMPT, limit=20, api_name="/heatmap")[1]
    red = next(feature["feature"] for feature in features if feature["label"] == "red")
    found = client.predict(prompt=PROMPT, feature=red, limit=3, api_name="/explain")
    assert (found["hookpoint"], found["feature"], found["label"], found["row"]) == (place, red, "red", None)
    shares = {word["word"]: word["share"] for word in found["words"]}
    assert next(iter(shares)) == "red"
    assert shares["red"] == pytest.approx(found["words"][0]["measured"] / found["drive"])
    assert len(found["features"]) == 3
    assert all(each["hookpoint"] != place and "label" in each for each in found["features"])
    at_patch = client.predict(prompt=PROMPT, feature=red, step=6, row=4, column=4, limit=1, api_name="/explain")
    assert (at_patch["step"], at_patch["row"], at_patch["column"]) == (6, 4, 4)


def test_search_finds_by_number_label_and_words(client: Client, place: str, best: dict[str, Any]) -> None:
    assert client.predict(query="7", hookpoint=place, limit=3, api_name="/search_features")[0]["reason"] == "number"
    labelled = client.predict(query=best["label"], hookpoint=place, limit=5, api_name="/search_features")
    assert labelled[0]["label"] == best["label"]
    assert len(client.predict(query="", hookpoint=place, limit=20, api_name="/search_features")) == 20
    assert client.predict(query="xyzzy", hookpoint=place, limit=3, api_name="/search_features") == []
    with pytest.raises(REFUSALS, match="does not exist"):
        client.predict(query="99999999", hookpoint=place, limit=3, api_name="/search_features")


def test_feature_gives_its_card_and_its_best_images(client: Client, place: str, best: dict[str, Any]) -> None:
    card, pictures = client.predict(hookpoint=place, feature=best["feature"], api_name="/feature")
    assert (card["feature"], card["label"]) == (best["feature"], best["label"])
    assert len(pictures) == len(card["top_images"]) > 0
    assert Image.open(pictures[0]["image"]).size == (512, 512)


def test_directions_gives_neighbours_and_a_plot(client: Client, place: str, best: dict[str, Any]) -> None:
    neighbours, plot = client.predict(hookpoint=place, feature=best["feature"], n_neighbours=20, api_name="/directions")
    cosines = [neighbour["cosine"] for neighbour in neighbours]
    assert len(neighbours) == 20
    assert cosines == sorted(cosines, reverse=True)
    assert best["feature"] not in {neighbour["feature"] for neighbour in neighbours}
    assert json.loads(plot["plot"])["data"]


def test_steer_gives_before_after_recipe_and_measurements(client: Client, place: str, best: dict[str, Any]) -> None:
    edit = {"hookpoint": place, "feature": best["feature"], "mode": "add", "strength": 3.0}
    before, after, facts = client.predict(prompt=PROMPT, edits=[edit], api_name="/steer")
    assert Image.open(before).tobytes() != Image.open(after).tobytes()
    assert Recipe.from_dict(facts["recipe"]).edits[0].to_dict() == {**edit, "steps": None, "region": None}
    measured = facts["measurements"]
    assert measured["distance"] > 0
    assert measured["distance_of_unrelated"] > 0
    assert measured["denoising_error_ratio"] > 0
    assert isinstance(measured["looks_natural"], bool)


def test_steer_with_no_edit_or_an_identity_leaves_the_image_as_it_is(
    client: Client, place: str, best: dict[str, Any]
) -> None:
    identity = {"hookpoint": place, "feature": best["feature"], "mode": "scale", "strength": 1}
    for edits in ([], [identity]):
        before, after, _ = client.predict(prompt=PROMPT, edits=edits, api_name="/steer")
        assert Image.open(before).tobytes() == Image.open(after).tobytes()


def test_sweep_gives_an_image_a_strength_and_accepts_json_text(
    client: Client, place: str, best: dict[str, Any]
) -> None:
    arguments = {"prompt": PROMPT, "hookpoint": place, "feature": best["feature"], "mode": "add"}
    grid, rows = client.predict(**arguments, strengths=[0, 2, 4], api_name="/sweep")
    assert len(grid) == 3
    assert [row["strength"] for row in rows] == [0, 2, 4]
    assert rows[0]["distance"] == 0 < rows[2]["distance"]
    assert len(client.predict(**arguments, strengths="[1]", region=None, api_name="/sweep")[0]) == 1


def test_compare_finds_what_differs_and_gives_both_images(client: Client) -> None:
    other = PROMPT.replace("red", "blue")
    features, one, two = client.predict(prompt=PROMPT, other=other, limit=6, api_name="/compare")
    assert len(features) == 6
    assert {"red", "blue"} & {feature["label"] for feature in features}
    changes = [abs(feature["relative"] - feature["other_relative"]) for feature in features]
    assert min(changes) > 0
    assert Image.open(one).tobytes() != Image.open(two).tobytes()


def test_silence_gives_what_each_word_leaves_with_the_images_tried(client: Client, best: dict[str, Any]) -> None:
    asked = {"feature": best["feature"], "limit": 2, "n_images": 2}
    found, images = client.predict(**asked, api_name="/silence")
    assert (found["feature"], len(found["images"]), len(images)) == (best["feature"], 2, 6)
    assert " of 2 images" in found["verdict"]
    for image in found["images"]:
        assert [word["left"] for word in image["words"]] == sorted(word["left"] for word in image["words"])
        assert all(word["word"] not in word["prompt"].split() for word in image["words"])


def test_swap_gives_an_image_that_its_recipe_makes_again(client: Client) -> None:
    before, after, facts = client.predict(
        prompt=PROMPT, old="red", new="yellow", num_inference_steps=20, api_name="/swap"
    )
    assert isinstance(facts["is_read"], bool)
    edits = [edit.to_dict() for edit in Recipe.from_dict(facts["recipe"]).edits]
    again = client.predict(prompt=PROMPT, edits=edits, api_name="/steer")
    assert [Image.open(one).tobytes() for one in (before, after)] == [Image.open(one).tobytes() for one in again[:2]]


def test_layers_matches_features_of_two_hook_points(client: Client, place: str) -> None:
    found = client.predict(limit=3, api_name="/layers")
    assert (len(found["pairs"]), found["second"]) == (3, place)
    assert found["pairs"][0]["first"]["hookpoint"] == found["first"] != place
    assert found["n_pairs"] >= 3
    with pytest.raises(REFUSALS, match="Both hook points are"):
        client.predict(first=place, second=place, api_name="/layers")


def test_a_run_is_asked_for_by_name_and_an_unknown_one_is_refused(client: Client) -> None:
    for run in (None, "miniature"):
        assert client.predict(query="", limit=1, run=run, api_name="/search_features")
    with pytest.raises(REFUSALS, match="run is 'other'; give one of miniature"):
        client.predict(query="", limit=1, run="other", api_name="/search_features")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/heatmap", {"prompt": "  "}, "prompt is blank"),
    ("/heatmap", {"prompt": "x" * 10_000}, "prompt has 10,000 characters; give at most 2,000"),
    ("/heatmap", {"prompt": "x" * 2_000_000}, "prompt has 2,000,000 characters"),
    ("/heatmap", {"prompt": ["a"]}, "prompt is"),
    ("/heatmap", {"prompt": PROMPT, "seed": -1}, "seed is -1; give a whole number from 0 to"),
    ("/heatmap", {"prompt": PROMPT, "seed": True}, "seed is True"),
    ("/heatmap", {"prompt": PROMPT, "hookpoint": "layer99"}, "hookpoint is 'layer99'; give one of"),
    ("/heatmap", {"prompt": PROMPT, "step": 99}, "step is 99; give a whole number from 0 to"),
    ("/read_picture", {"picture": "https://example.org/cat.png"}, "Links are not followed"),
    ("/read_picture", {"picture": "data:image/png;base64,aGVsbG8="}, "is no picture of a kind that is read"),
    ("/steer", {"prompt": "", "edits": []}, "prompt is blank"),
    ("/features_at", {"prompt": PROMPT, "row": 8, "column": 0}, "row is 8; give a whole number from 0 to 7"),
    ("/features_at", {"prompt": PROMPT, "row": None, "column": 0}, "row is None"),
    ("/explain", {"prompt": PROMPT, "feature": 1, "row": 3}, "row is 3 and column is None; give both"),
    ("/explain", {"prompt": PROMPT, "feature": 10**9}, "feature is 1000000000; give a whole number"),
    ("/search_features", {"query": "x" * 500}, "query has 500 characters"),
    ("/feature", {"feature": -3}, "feature is -3; give a whole number from 0 to"),
    ("/feature", {"feature": "../../run.json"}, "feature is '../../run.json'"),
    ("/feature", {"feature": 10**30}, "feature is 1000"),
    ("/directions", {"feature": 1, "n_neighbours": 0}, "n_neighbours is 0"),
    ("/steer", {"prompt": PROMPT, "edits": [{"feature": 1}]}, "edits[0]"),
    ("/steer", {"prompt": PROMPT, "edits": "not json"}, "give valid JSON"),
    ("/sweep", {"prompt": PROMPT, "feature": 1, "strengths": "all"}, "strengths is 'all'"),
    ("/sweep", {"prompt": PROMPT, "feature": 1, "strengths": [1], "mode": "explode"}, "mode is 'explode'"),
]


@pytest.mark.parametrize(("name", "arguments", "words"), BAD, ids=[f"{name}-{words[:28]}" for name, _, words in BAD])
def test_bad_input_is_refused_in_words(client: Client, name: str, arguments: Any, words: str) -> None:
    with pytest.raises(REFUSALS) as refused:
        client.predict(**arguments, api_name=name)
    assert words in str(refused.value)


@pytest.mark.parametrize("number", ["NaN", "1e309", "-1e309", "true", "[1]", '{"a": 1}', '"7"'])
def test_raw_http_numbers_that_are_none_are_refused(served: page_server.Page, number: str) -> None:
    body = f'{{"data": ["{PROMPT}", null, {number}, 20, null, 4]}}'
    answer = requests.post(
        f"{served.url}/gradio_api/call/heatmap", data=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code in {400, 422}
    assert answer.status_code != 422 or "seed" in answer.text or "json" in answer.text.lower()


@pytest.mark.parametrize("more", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["plain", "as a file"])
def test_a_file_of_the_servers_machine_is_no_picture_of_the_visitors(served: page_server.Page, more: Any) -> None:
    path = str(page_server.ROOT / "docs" / "heatmap.png")
    body = {"data": [{"path": path, **more}, "", None, None, 0, 4, None]}
    answer = requests.post(f"{served.url}/gradio_api/call/read_picture", json=body, timeout=30)
    assert answer.status_code in {400, 422}
    assert "give a data URL" in answer.text or "not uploaded by a user" in answer.text


@pytest.mark.parametrize(
    ("body", "words"), [({}, "required argument: prompt"), ({"prompt": PROMPT, "sed": 1}, "`sed` is not a valid")]
)
def test_a_missing_or_unknown_argument_by_name_is_refused_in_words(
    served: page_server.Page, body: dict[str, Any], words: str
) -> None:
    answer = requests.post(f"{served.url}/gradio_api/call/v2/heatmap", json=body, timeout=30)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


def test_the_app_still_serves_after_all_that(client: Client) -> None:
    assert client.predict(prompt=PROMPT, limit=1, api_name="/heatmap")[1]


def test_html_in_a_prompt_comes_back_as_text(client: Client) -> None:
    image, _, _ = client.predict(prompt="<script>alert(1)</script> red circle", limit=1, api_name="/heatmap")
    assert Path(image).suffix == ".png"


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        str(page_server.ROOT / "pyproject.toml"),
        str(page_server.ROOT / "fluxsae/miniature/run/run.json"),
        "../../pyproject.toml",
        "app.py",
    ],
)
def test_files_of_the_machine_are_not_served(served: page_server.Page, path: str) -> None:
    assert requests.get(f"{served.url}/gradio_api/file={path}", timeout=30).status_code in {403, 404}


def test_a_file_address_keeps_working_when_a_later_call_fails(served: page_server.Page, client: Client) -> None:
    raw = Client(served.url, verbose=False, download_files=False)
    image = raw.predict(prompt=PROMPT, limit=1, api_name="/heatmap")[0]
    address = image["url"] if isinstance(image, dict) else image
    with pytest.raises(REFUSALS):
        client.predict(prompt="", api_name="/heatmap")
    assert requests.get(address, timeout=30).content.startswith(b"\x89PNG")


def test_a_cancelled_generation_frees_the_lane_and_the_next_is_exact(client: Client) -> None:
    before = Image.open(client.predict(prompt=PROMPT, seed=5, api_name="/heatmap")[0]).tobytes()
    job = client.submit(prompt="a small blue star", seed=77, num_inference_steps=60, api_name="/heatmap")
    time.sleep(0.5)
    job.cancel()
    image = client.predict(prompt=PROMPT, seed=5, limit=3, api_name="/heatmap")[0]
    assert Image.open(image).tobytes() == before


def test_answers_are_not_mixed_up_between_visitors(served: page_server.Page, client: Client) -> None:
    alone = {seed: client.predict(prompt=PROMPT, seed=seed, limit=2, api_name="/heatmap")[1] for seed in range(10, 14)}
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        found[seed] = Client(served.url, verbose=False).predict(prompt=PROMPT, seed=seed, limit=2, api_name="/heatmap")[
            1
        ]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == alone


def mcp(served: page_server.Page, method: str, **params: Any) -> dict[str, Any]:
    answer = requests.post(
        f"{served.url}/gradio_api/mcp/",
        json={"jsonrpc": "2.0", "id": 1, "method": method, "params": params},
        headers={"Accept": "application/json, text/event-stream"},
        timeout=120,
    )
    lines = [line[5:] for line in answer.text.splitlines() if line.startswith("data:")] or [answer.text]
    return json.loads(lines[-1])


def test_mcp_offers_every_endpoint_as_a_tool_described_like_the_api(served: page_server.Page, client: Client) -> None:
    tools = {tool["name"]: tool for tool in mcp(served, "tools/list")["result"]["tools"]}
    for name in ENDPOINTS:
        tool = next(tool for key, tool in tools.items() if key.endswith(name.strip("/")))
        assert tool["description"]
        described = {key: value["description"] for key, value in tool["inputSchema"]["properties"].items()}
        assert described == {key: value["type"]["description"] for key, value in parameters(client, name).items()}
        assert tool["name"] == tool_name(name.strip("/"))


def test_mcp_answers_and_refuses_like_the_others(served: page_server.Page) -> None:
    names = [tool["name"] for tool in mcp(served, "tools/list")["result"]["tools"]]
    name = next(name for name in names if name.endswith("search_features"))
    found = mcp(served, "tools/call", name=name, arguments={"query": "", "limit": 2})["result"]
    assert not found.get("isError")
    refused = mcp(served, "tools/call", name=name, arguments={"query": "", "limit": 0})
    assert "limit is 0" in json.dumps(refused)


@pytest.mark.parametrize("wants_progress", [False, True])
def test_a_real_mcp_client_gets_json_and_images(served: page_server.Page, wants_progress: bool) -> None:
    async def hear(*_: Any) -> None:
        return None

    async def ask() -> list[Any]:
        async with (
            streamablehttp_client(f"{served.url}/gradio_api/mcp/") as (reader, writer, _),
            ClientSession(reader, writer) as session,
        ):
            await session.initialize()
            arguments = {"prompt": PROMPT, "limit": 2}
            found = await session.call_tool("heatmap", arguments, progress_callback=hear if wants_progress else None)
            return list(found.content)

    contents = page_server.in_a_thread(anyio.run, ask)
    assert [content.type for content in contents] == ["image", "text", "text", *["image", "text"] * 2]
    picture = Image.open(io.BytesIO(base64.b64decode(contents[0].data)))
    assert picture.size == (128, 128)
    texts = [json.loads(content.text) for content in contents if content.type == "text"]
    assert texts[0]["url"].startswith(served.url)
    assert [feature["feature"] for feature in texts[1]]
    assert "of its maximum" in texts[2]["caption"]


def test_the_log_holds_no_prompt(served: page_server.Page, client: Client) -> None:
    client.predict(prompt="a purple heart 8675309", api_name="/heatmap")
    assert "8675309" not in served.log.read_text()


def test_the_run_that_is_served_is_the_embedded_one(client: Client, place: str) -> None:
    run = RunFolder(page_server.ROOT / "fluxsae" / "miniature" / "run")
    assert place == str(run.hookpoints()[-1])
