"""A small grammar: stories, which the dense demo model learnt, and postcards, which it learns as an MoE.

Everything is drawn from a `random.Random`, so a seed fixes the text. Nothing is copied from a data set.
"""

import random

NAMES = {
    "Mia": "she", "Tom": "he", "Lily": "she", "Ben": "he", "Anna": "she", "Max": "he",
    "Rosa": "she", "Sam": "he", "Zoe": "she", "Paul": "he", "Emma": "she", "Jack": "he",
}  # fmt: skip
ANIMALS = ["fox", "bear", "cat", "dog", "mouse", "frog", "duck", "rabbit", "bird", "horse"]
MOODS = ["little", "kind", "brave", "shy", "happy", "clever"]
PLACES = {
    "forest": "in the forest", "lake": "at the lake", "garden": "in the garden", "farm": "on the farm",
    "beach": "on the beach", "village": "in the village", "hill": "on the hill", "river": "by the river",
}  # fmt: skip
COLOURS = ["red", "blue", "green", "yellow", "white", "black"]
THINGS = ["ball", "box", "kite", "hat", "boat", "book", "bell", "key"]
SPOTS = ["under a tree", "behind a stone", "near a bush", "next to a gate"]
HOBBIES = {"play": "played", "sing": "sang", "dance": "danced", "swim": "swam", "run": "ran", "read": "read"}
# trouble -> how the helper ends it; {thing} is filled in
TROUBLES = {
    "was too heavy": "They pushed the {thing} together, and it moved.",
    "was broken": "{friend} had some glue, and they fixed the {thing}.",
    "was very dirty": "They washed the {thing} in the water, and it was clean.",
    "was stuck": "{friend} pulled and pulled, and the {thing} came out.",
}
WEATHERS = ["warm", "sunny", "cold", "windy", "rainy", "fine"]
MEALS = ["soup", "cake", "bread", "fish", "apples", "honey"]


def story(rng: random.Random) -> tuple[str, str]:
    """A request for a story and the story itself."""
    name, friend = rng.sample(list(NAMES), 2)
    animal, mood = rng.choice(ANIMALS), rng.choice(MOODS)
    place, where = rng.choice(list(PLACES.items()))
    colour, thing, spot = rng.choice(COLOURS), rng.choice(THINGS), rng.choice(SPOTS)
    hobby, played = rng.choice(list(HOBBIES.items()))
    trouble, end = rng.choice(list(TROUBLES.items()))
    he = NAMES[name]
    request = f"Tell a story about a {mood} {animal} named {name} {where}."
    lines = [
        f"Once upon a time there was a {mood} {animal} named {name}. {he.capitalize()} lived {where}. "
        f"Every day {he} liked to {hobby}.",
        f"One day {name} found a {colour} {thing} {spot}. But the {thing} {trouble}. {name} was sad.",
        f'Then {friend} came to the {place}. "Can you help me?" asked {name}. "Yes, I can," said {friend}. '
        + end.format(thing=thing, friend=friend),
        f"{name} and {friend} were happy. They {played} {where} until the sun went down. The end.",
    ]
    return request, "\n".join(lines)


def postcard(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A request for a postcard and the postcard itself.

    Whether a postcard is held out depends on who writes to whom, so no held-out pair of names is ever trained on.
    """
    names = list(NAMES)
    while True:
        writer, reader = rng.sample(range(len(names)), 2)
        if ((writer + 2 * reader) % 4 == 0) == held_out:
            break
    writer, reader = names[writer], names[reader]
    place, where = rng.choice(list(PLACES.items()))
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    request = f"Write a postcard from {writer} to {reader}. {writer} is {where}."
    lines = [
        f"Dear {reader},",
        f"I am {where} and it is {rng.choice(WEATHERS)}. In the morning we had {rng.choice(MEALS)}. "
        f"I bought a {colour} {thing} for you. Come to the {place} soon!",
        f"Love, {writer}",
    ]
    return request, "\n".join(lines)


def postcard_rows(count: int, held_out: bool, seed: int) -> list[dict]:
    """`count` postcards as rows {"messages": [user, assistant]} for supervised fine-tuning."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        request, answer = postcard(rng, held_out)
        rows.append(
            {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]},
        )
    return rows
