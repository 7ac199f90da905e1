"""Self-consistency: what counts as an answer, and which answer wins."""

import pytest

from hf_moe.generation.self_consistency import extract_answer, majority


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7, so the answer is 7.", "7"),
        ("The answer is: Paris. Not Rome.", "Paris"),
        ("First 12, the answer is 12.\nNo: the answer is 13.", "13"),
        ("She pays 5 * 240.\n#### 1,200", "1200"),
        ("#### $1,200.0", "1200"),
        (r"So 7 of 8: \boxed{\frac{7}{8}}.", r"\frac{7}{8}"),
        (r"\boxed{3} or rather \boxed{ 4 }", "4"),
        ("It rains 3 days, then 4, so -7.50 in all", "-7.5"),
        ("That makes 5-3 of them, $12", "12"),
        ("5-3", "3"),
        ("0", "0"),
        ("100", "100"),
        ("  the frog\n and the fox ", "the frog and the fox"),
        ("\n ", None),
    ],
)
def test_the_answer_of_a_text(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "8", "8"], ("8", 2)),
        (["7", "8", "8", "7"], ("7", 2)),
        ([None, None, "3"], ("3", 1)),
        ([None], (None, 0)),
    ],
    ids=["most", "first-of-equals", "no-vote-for-none", "none"],
)
def test_the_majority(answers, winner):
    assert majority(answers) == winner
