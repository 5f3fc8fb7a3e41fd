"""Scores of texts: published examples where there are some, and numbers by hand.

The scorer of the E2E challenge publishes scores of its baseline's texts, which are no
part of this repository. What is checked here is what its parts are defined by.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from bidora.tasks import text_scores as module
from bidora.tasks.text_scores import TEXT_METRICS, text_scores


@pytest.fixture
def scorers() -> None:
    """Skip where the extra `generation` is not installed."""
    for name in ("sacrebleu", "nltk", "pycocoevalcap"):
        pytest.importorskip(name, reason="needs the extra generation")


def score(
    name: str, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    return float(module._SCORERS[name](texts, references))


@pytest.mark.usefixtures("scorers")
def test_bleu_of_papinenis_example() -> None:
    # [PRWZ02, section 2.1]: precisions of 17/18 words and 10/17 pairs; by hand 7/16
    # triples and 4/15 of four, and the closest reference has 18 words, as the text.
    text = (
        "It is a guide to action which ensures that the military always obeys the "
        "commands of the party"
    )
    references = [
        "It is a guide to action that ensures that the military will forever heed Party "
        "commands",
        "It is the guiding principle which guarantees the military forces always being "
        "under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    expected = (17 / 18 * 10 / 17 * 7 / 16 * 4 / 15) ** (1 / 4)
    assert score("bleu", [text], [references]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("scorers")
def test_bleu_takes_as_many_references_as_an_input_has() -> None:
    texts = ["a b c d e", "a b c d e"]
    few = score("bleu", texts, [["a b c d e"], ["f g h i j", "a b c d e"]])
    assert few == pytest.approx(1.0, rel=1e-9)
    assert score("bleu", texts, [["a b c d e"], ["f g h i j"]]) < 0.6


@pytest.mark.usefixtures("scorers")
def test_bleu_is_short_by_the_brevity_penalty() -> None:
    # All of the text's n-grams are right, and it has 5 of 10 words.
    whole = "a b c d e f g h i j"
    assert score("bleu", ["a b c d e"], [[whole]]) == pytest.approx(
        math.exp(1 - 10 / 5)
    )


@pytest.mark.usefixtures("scorers")
def test_nist_by_hand() -> None:
    # Each of five words stands once in the one reference: log2(5/1) bits a word, and a
    # longer n-gram tells nothing that its beginning has not.
    words = "a b c d e"
    assert score("nist", [words], [[words]]) == pytest.approx(math.log2(5))
    # Two references: "a" stands twice in ten words, so the last four of each tell more.
    told = (math.log2(10 / 2) + 4 * math.log2(10 / 1)) / 5  # words
    told += math.log2(2 / 1) / 4  # "a b" says which of two follows "a"
    assert score("nist", [words], [[words, "a f g h i"]]) == pytest.approx(told)


@pytest.mark.usefixtures("scorers")
def test_nist_halves_at_two_thirds_of_the_length() -> None:
    # [Dod02]: the penalty is 1/2 for a text of two thirds of its reference's words.
    whole = " ".join("abcdefghi")
    assert score("nist", [whole[:11]], [[whole]]) == pytest.approx(math.log2(9) / 2)


@pytest.mark.usefixtures("scorers")
@pytest.mark.parametrize(
    ("text", "expected"),
    [("police kill the gunman", 3 / 4), ("the gunman kill police", 2 / 4)],
)
def test_rouge_l_of_lins_example(text: str, expected: float) -> None:
    # [Lin04, section 3.1]; precision and recall are equal, so the weight plays no part.
    found = score("rouge_l", [text], [["police killed the gunman"]])
    assert found == pytest.approx(expected)


@pytest.mark.usefixtures("scorers")
def test_rouge_l_weighs_recall_as_cocos_scorer_does() -> None:
    # Two of two words right, of four: P = 1, R = 1/2, beta = 1.2.
    expected = (1 + 1.44) * 1 * 0.5 / (0.5 + 1.44 * 1)
    assert score("rouge_l", ["a b"], [["a b c d"]]) == pytest.approx(expected)


@pytest.mark.usefixtures("scorers")
def test_cider_by_hand() -> None:
    # Words of one input alone weigh log 2, "a" of both weighs 0. The first text is its
    # reference: cosine 1 for each n up to 3, and it has no four words. The second shares
    # no word that tells anything. Ten times the mean of both, and of n = 1 to 4.
    found = score("cider", ["a b c", "a x y"], [["a b c"], ["a d e"]])
    assert found == pytest.approx(10 * (3 / 4 + 0) / 2)


@pytest.mark.usefixtures("scorers")
def test_a_longer_text_loses_by_ciders_penalty() -> None:
    # Three words and two pairs more, so that half of what tells is right: the cosine of
    # words is 2 / sqrt(2 * 4), with the penalty of two pairs exp(-4 / 72).
    found = score("cider", ["b c p q", "z"], [["b c"], ["z y"]])
    first = (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4 * math.exp(-4 / 72)
    second = (1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert found == pytest.approx(10 * (first + second) / 2)


@pytest.mark.usefixtures("scorers")
def test_points_and_capitals_do_not_count_where_coco_leaves_them_out() -> None:
    assert module._words("Aromi's a pub. It isn't cheap, though: £20!") == (
        "aromi 's a pub it is n't cheap though £ 20"
    )
    assert score("rouge_l", ["the pub."], [["The pub"]]) == pytest.approx(1.0)


@pytest.mark.usefixtures("scorers")
def test_what_can_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = text_scores(["a pub"], [["a cafe"]])
    assert set(found.scores) == {"bleu", "rouge_l"}
    assert "NIST counts 5-grams" in found.missing["nist"]
    assert "there is no java" in found.missing["meteor"]
    assert "of a single input" in found.missing["cider"]


def test_a_missing_library_is_told_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lacking(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", lacking)
    found = text_scores(["a pub"], [["a cafe"]])
    assert not found.scores
    assert set(found.missing) == set(TEXT_METRICS)
    for why in found.missing.values():
        assert why.startswith("No module named")
        assert why.endswith('pip install "hypergrad-bidora[generation]"')


@pytest.mark.slow
@pytest.mark.usefixtures("scorers")
@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR 1.5 needs java")
def test_meteor_of_a_text_that_is_its_reference() -> None:
    texts = ["aromi is a pub in the city", "it serves french food"]
    assert score("meteor", texts, [[t] for t in texts]) == pytest.approx(1.0)
    assert score("meteor", texts, [[t] for t in texts[::-1]]) < 0.1
