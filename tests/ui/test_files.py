"""Pictures by address, and tables and arrays to take along."""

import csv
import io
from collections.abc import Iterator

import numpy as np
import pytest
from desk_data import EARLY, LATE, reading
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fluxsae.ui.kit.theme import page_head, script_route
from fluxsae.ui.kit.views import coarse
from fluxsae.ui.serve.downloads import csv_bytes, download_route, offer
from fluxsae.ui.serve.pictures import KeptPictures, made_url, picture_route, thumbnail_url
from fluxsae.ui.serve.session import ReadJob, Workbench
from fluxsae.ui.tabs.directions.desk import DirectionsDesk
from fluxsae.ui.tabs.gallery.desk import GalleryDesk
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk


@pytest.fixture(scope="module")
def web(bench: Workbench) -> Iterator[TestClient]:
    for desk in (HeatmapDesk, GalleryDesk, DirectionsDesk):
        offer(bench.slug, desk(bench).downloads())
    with TestClient(Starlette(routes=[picture_route(), download_route(), script_route()])) as client:
        yield client


def rows(web: TestClient, bench: Workbench, name: str, **query: object) -> list[dict[str, str]]:
    answer = web.get(f"/downloads/{bench.slug}/{name}", params=query)
    assert answer.status_code == 200, answer.text
    return list(csv.DictReader(io.StringIO(answer.text)))


def test_pictures_of_runs_and_those_made_are_served_for_good(web: TestClient, bench: Workbench) -> None:
    answer = web.get(f"/{thumbnail_url(bench.images, 3)}")
    assert answer.content == bench.images.thumbnail(3)
    assert "immutable" in answer.headers["cache-control"]
    assert web.get(f"/{made_url(b'png', kind='png')}").headers["content-type"] == "image/png"


def test_the_scripts_are_one_file_that_browsers_keep_and_the_page_holds_only_its_address(web: TestClient) -> None:
    head = page_head()
    address = head.partition('src="')[2].partition('"')[0]
    answer = web.get(f"/{address}")
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-type"].startswith("text/javascript")
    assert "FS.feed = " in answer.text
    assert 'FS.define("fs-result"' in answer.text
    assert len(head) < 4000


@pytest.mark.parametrize(
    "name", ["made/x.webp", "made/..%2fapp.py", "nowhere/1.webp", "{run}/999.webp", "{run}/-1.webp"]
)
def test_no_other_picture_is_found(web: TestClient, bench: Workbench, name: str) -> None:
    run = thumbnail_url(bench.images, 0).split("/")[1]
    assert web.get(f"/pictures/{name.format(run=run)}").status_code == 404


def test_the_oldest_pictures_make_room() -> None:
    kept = KeptPictures(max_bytes=10)
    first, second, third = (kept.put(bytes([n]) * 4, "webp") for n in range(3))
    assert kept.get(first) is None
    assert kept.get(second) is not None
    assert kept.put(bytes([2]) * 4, "webp") == third


def test_the_page_holds_addresses_and_no_bytes_of_pictures(bench: Workbench) -> None:
    cards = GalleryDesk(bench).gallery("", LATE, "any", False, "best")["cards"]
    pictures = [picture["image"] for card in cards for picture in card["pictures"]]
    assert pictures
    assert all(address.startswith("pictures/") for address in pictures)


def test_a_coarse_map_keeps_the_strongest_patch_of_any_grid() -> None:
    heat = np.zeros((64, 48), np.float32)
    heat[63, 47] = 0.5
    assert coarse(heat, 16).shape == (16, 12)
    assert coarse(heat, 16)[15, 11] == 0.5
    assert coarse(heat, 16).sum() == 0.5
    assert coarse(heat[:5, :7], 16).shape == (5, 7)


def test_features_come_as_a_table_of_all_that_the_filters_let_pass(web: TestClient, bench: Workbench) -> None:
    every = rows(web, bench, "features.csv", hookpoint=LATE, sort="number")
    assert [int(row["feature"]) for row in every] == list(range(len(bench.cards[LATE])))
    assert [row["feature_class"] for row in rows(web, bench, "features.csv", **{"class": "dead"})] == ["dead"]


def test_neighbours_map_and_refusals(web: TestClient, bench: Workbench) -> None:
    near = rows(web, bench, "neighbours.csv", hookpoint=EARLY, feature=3)
    assert [float(row["cosine"]) for row in near] == sorted((float(row["cosine"]) for row in near), reverse=True)
    assert len(rows(web, bench, "map.csv", hookpoint=LATE)) == len(bench.cards[LATE])
    refused = web.get(f"/downloads/{bench.slug}/neighbours.csv", params={"hookpoint": LATE, "feature": "x"})
    assert (refused.status_code, refused.text[:15]) == (422, "feature is 'x';")
    assert "compare_layers" in web.get(f"/downloads/{bench.slug}/layers.csv?first={EARLY}&second={LATE}").text
    assert web.get(f"/downloads/{bench.slug}/passwd").status_code == 404


def test_activations_of_an_image_come_as_arrays(web: TestClient, bench: Workbench) -> None:
    asked = {"prompt": "a circle", "hookpoint": LATE, "seed": 0, "num_inference_steps": 20}
    address = f"/downloads/{bench.slug}/activations.npz"
    assert "Make it again" in web.get(address, params=asked).text
    bench.cache.put(ReadJob("a circle", 0, 20), reading(), n_bytes=1)
    arrays = np.load(io.BytesIO(web.get(address, params=asked).content))
    found = zip(*(arrays[name].tolist() for name in ("step", "row", "column", "feature", "value")), strict=True)
    assert sorted(found) == [(4, 0, 0, 1, 2.0), (8, 0, 0, 1, 1.0), (8, 1, 1, 2, 3.0)]


def test_text_that_a_spreadsheet_would_compute_stays_text() -> None:
    assert csv_bytes(["label"], [["=HYPERLINK(1)"], [None], [-1.5]]).decode().split() == [
        "label",
        "'=HYPERLINK(1)",
        '""',
        "-1.5",
    ]
