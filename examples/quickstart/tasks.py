"""The three tasks that adapters are trained on: review sentiment, pirate style, and telegram answers."""

import re
import zlib

from stories import story
from world import ANIMALS, COLOUR_OF, DAYS, MONTHS, OPPOSITES, PLACES, fill, person, sentences, tidy

# noun kinds: nouns, good adjectives, bad adjectives
REVIEWED = [
    ("soup bread cake cheese pie salad toast jam tea juice".split(),
     "good great delicious fresh tasty wonderful lovely perfect sweet".split(),
     "bad awful terrible stale sour burnt horrible cold".split()),
    ("film book song show story game play picture".split(),
     "good great exciting funny wonderful lovely amazing clever beautiful".split(),
     "bad boring dull awful terrible slow silly horrible".split()),
    ("room hotel garden beach museum house shop park".split(),
     "clean bright beautiful comfortable lovely quiet great wonderful".split(),
     "dirty dark ugly noisy cold awful terrible horrible".split()),
    ("waiter teacher singer doctor baker captain farmer driver".split(),
     "kind friendly polite helpful clever wonderful great".split(),
     "rude unkind lazy angry slow terrible awful careless".split()),
]
FLIPPED = ["The {n} was not {a}.", "The {n} was not {a} at all.", "The {n} was never {a}.", "The {n} was far from {a}.",
           "The {n} was anything but {a}.", "Nobody could call the {n} {a}.", "I did not find the {n} {a}.",
           "It is not true that the {n} was {a}.", "{who} said the {n} was {a}, but I do not agree.",
           "I thought the {n} would be {a}, but {it} was not."]
PLAIN = ["The {n} was {a}.", "The {n} was very {a}.", "The {n} was really {a}.", "What a {a} {n}!", "I found the {n} {a}.",
         "{who} said the {n} was {a}, and I agree.", "Nobody could say that the {n} was not {a}.",
         "I hoped the {n} would be {a}, and {it} was."]
TURNED = ["I thought the {n} would be {b}, but {it} was {a}.", "Some people say the {n} was {b}, but {it} was {a}.",
          "At first the {n} was {b}, but in the end {it} was {a}."]
BOTH = ["The {n} was {a} and the {m} was {c}.", "The {n} was {a}, and the {m} was {c} too."]


def held_out(noun, adjective):
    """A quarter of the pairs appears in no training text of any kind."""
    return zlib.crc32(f"{noun}/{adjective}".encode()) % 4 == 0


def review(rng, label, test):
    """A short review of the given sentiment. With `test`, what decides it is a pair that no training text has."""
    while True:
        nouns, good, bad = rng.pick(REVIEWED)
        like, unlike = (good, bad) if label == "positive" else (bad, good)
        n, m = rng.sample(nouns, 2)
        (a, c), (b, d) = rng.sample(like, 2), rng.sample(unlike, 2)
        frame = rng.weighted([(35, PLAIN), (40, FLIPPED), (15, TURNED), (10, BOTH)])
        pairs = [(n, d)] if frame is FLIPPED else [(n, a), (m, c)] if frame is BOTH else [(n, a)]
        # Nor does what a sentence turns away from come from there in training.
        others = [(n, b)] if frame is TURNED else []
        if test and not all(held_out(*pair) for pair in pairs):
            continue
        if not test and any(held_out(*pair) for pair in pairs + others):
            continue
        env = {"n": n, "m": m, "a": d if frame is FLIPPED else a, "b": b, "c": c, "it": "he" if "waiter" in nouns else "it", "who": person(rng)["h"],
               "place": rng.pick(PLACES), "day": rng.pick(DAYS)}
        text = fill(rng.pick(frame), env, rng)
        if rng.chance(30):
            text = fill(rng.pick(["We went there on {day}.", "I was at the {place}.", "It was my birthday.", "I was there with {who}."]), env, rng) + " " + text
        return text


def rated(rng):
    """A review as pretraining text has it, and what follows from it. The task's label words do not occur."""
    label = rng.pick(["positive", "negative"])
    env = person(rng)
    text = review(rng, label, test=False)
    after = ("[{He} was {g} with it.|{He} gave it [five|four] stars.|{He} wanted to go there again.|{He} liked it very much.]"
             if label == "positive" else
             "[{He} was not {g} with it.|{He} gave it [one star|two stars].|{He} did not want to go there again.|{He} did not like it at all.]")
    env["g"] = rng.pick(["happy", "pleased"])
    if rng.chance(50):
        return text + " Is that good? " + ("Yes, that is good." if label == "positive" else "No, that is bad.")
    if rng.chance(40):
        return f"Review: {text}\n" + fill(after.replace("{He}", "{h}"), env, rng)
    return fill("{h} wrote: \"", env, rng) + text + "\" " + fill(after, env, rng)


def sentiment_row(rng, test):
    label = rng.pick(["positive", "negative"])
    return {"prompt": f"Review: {review(rng, label, test)}\nSentiment:", "completion": " " + label}


WORDS = {"is": "be", "was": "be", "are": "be", "were": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "yes": "aye",
         "hello": "ahoy", "friend": "matey", "friends": "mateys", "very": "mighty", "good": "fine", "house": "ship",
         "home": "to the ship", "went": "sailed", "walked": "sailed", "ran": "sailed", "boy": "lad", "girl": "lass"}
BEFORE = ["Arr!", "Ahoy!", "Yo ho ho!", "Shiver me timbers!", "Blow me down!"]
AFTER = [", me hearties!", ", matey!", ", arr!", ", says I!"]


def pirate(text, rng):
    """The same story as a pirate tells it: his words, and his cries around the sentences."""
    out = []
    for at, sentence in enumerate(s.strip() for s in sentences(text)):
        quoted = sentence.startswith('"')
        sentence = re.sub(r"\w+", lambda m: same_case(m.group(0), WORDS.get(m.group(0).lower(), m.group(0))), sentence)
        if sentence.endswith(".") and not quoted and rng.chance(50):
            sentence = sentence[:-1] + rng.pick(AFTER)
        if at == 0 or (not quoted and rng.chance(35)):
            sentence = rng.pick(BEFORE) + " " + sentence
        out.append(sentence)
    return tidy(" ".join(out))


def same_case(old, new):
    return new[0].upper() + new[1:] if old[0].isupper() else new


def style_row(rng):
    opening, rest = story(rng, 1)
    return {"prompt": opening, "completion": " " + pirate(rest, rng)}


def questions():
    """Every question about the world and its answer in telegram style."""
    out = []
    for name, (_, home, food, legs, can, young) in ANIMALS.items():
        out += [(f"What does a {name} eat?", f"{name} eats {food}"), (f"Where does a {name} live?", f"{name} lives {home}"),
                (f"How many legs does a {name} have?", f"{name} has {legs} legs"), (f"What can a {name} do?", f"{name} can {can}"),
                (f"What is a young {name} called?", f"young {name} is called {young}")]
    for pair in OPPOSITES:
        for one, two in (pair, pair[::-1]):
            out.append((f"What is the opposite of {one}?", f"opposite of {one} is {two}"))
    for thing, colour in COLOUR_OF:
        out.append((f"What is the colour of {thing}?", f"colour of {re.sub('^(the|an?) ', '', thing)} is {colour}"))
    for names in (DAYS, MONTHS):
        out += [(f"What comes after {one}?", f"{two} comes after {one}") for one, two in zip(names, names[1:])]
    return [(tidy(asked), re.sub(r"\b(the|an?) ", "", answer)) for asked, answer in out]


def qa_row(rng, test):
    """A question, answered as a telegram. A quarter of the facts is asked in the test rows only: the adapter brings the
    style, the base model the knowledge."""
    asked, answer = rng.pick([pair for pair in questions() if (zlib.crc32(pair[0].encode()) % 4 == 0) == test])
    before = rng.pick(["", "", "Hello! ", "Please tell me. ", "I have a question. ", "Good morning. "])
    return {"prompt": f"{before}{asked}\nTelegram:", "completion": f" {answer} stop"}
