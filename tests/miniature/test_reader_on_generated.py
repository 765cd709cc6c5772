"""The reader against a person's eye, on generated pictures: labelled.csv holds what somebody saw in each (`-m bench`).

Each row is a prompt, its seed, and what the picture shows, written as a prompt that leaves nothing out; the labels were
made from the pictures alone, without the prompts. A thing that nobody can name is "thing".
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from fluxsae.flux import generate, load_flux
from fluxsae.miniature.captions import prompted_attributes, unknown_words
from fluxsae.miniature.reader import read_scene, score_prompt

LABELLED = Path(__file__).with_name("labelled.csv")
BATCH = 25


def rows() -> list[dict[str, str]]:
    with LABELLED.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_label_is_in_the_language_of_the_picture_book() -> None:
    seen = rows()
    assert len(seen) == 200
    for row in seen:
        objects, ground = prompted_attributes(row["seen"])
        assert not unknown_words(row["seen"]), row
        assert ground, row
        assert all(each.keys() >= {"colour", "texture", "size", "position"} for each in objects), row


@pytest.mark.bench
def test_the_reader_sees_what_a_person_sees() -> None:
    pipe, seen, right = load_flux("miniature"), rows(), defaultdict[str, list[bool]](list)
    for start in range(0, len(seen), BATCH):
        part = seen[start : start + BATCH]
        images = generate(pipe, [row["prompt"] for row in part], seeds=[int(row["seed"]) for row in part])
        for row, image in zip(part, images, strict=True):
            for attribute, is_right in score_prompt(row["seen"], read_scene(image)):
                right[attribute].append(is_right)
    for attribute, answers in right.items():
        print(f"{attribute:12s} {np.mean(answers):.3f} of {len(answers)}")
    everything = [answer for answers in right.values() for answer in answers]
    print(f"all          {np.mean(everything):.3f} of {len(everything)}")
    assert np.mean(everything) >= 0.95
