"""The small world that all quickstart text is about: its words, a seeded random generator, and a template filler.

Standard library only. Nothing here depends on Python's own `random`, whose sequences may change between versions.
"""

import re


class Rng:
    """SplitMix64 (Steele, Lea, Flood 2014): the same sequence on every machine and Python version."""

    def __init__(self, seed):
        self.state = seed & 0xFFFFFFFFFFFFFFFF

    def next(self):
        self.state = (self.state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return z ^ (z >> 31)

    def below(self, n):
        return self.next() % n

    def chance(self, percent):
        return self.below(100) < percent

    def pick(self, items):
        return items[self.below(len(items))]

    def sample(self, items, count):
        """`count` different items, in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(count)]

    def weighted(self, pairs):
        """One value of `[(weight, value), ...]`."""
        at = self.below(sum(weight for weight, _ in pairs))
        for weight, value in pairs:
            if at < weight:
                return value
            at -= weight
        raise AssertionError("weights are positive")


BOYS = "Tom Ben Sam Jack Leo Omar Finn Hugo Noah Otto Kofi Max".split()
GIRLS = "Anna Mia Lily Rosa Emma Nina Ella Zoe Clara Ivy Maya Ruby".split()
PETS = "Rex Milo Bella Coco Biscuit Pepper Daisy Shadow Lucky Star".split()
FAMILY = [("mother", "she"), ("father", "he"), ("sister", "she"), ("brother", "he"), ("grandmother", "she"),
          ("grandfather", "he"), ("uncle", "he"), ("aunt", "she")]
JOBS = "baker farmer doctor sailor teacher gardener painter singer cook shopkeeper".split()
# name: (sound, home, food, legs, what it can do, young one)
ANIMALS = {
    "dog": ("says woof", "in a house", "bones", "four", "run fast", "puppy"),
    "cat": ("says meow", "in a house", "fish", "four", "climb trees", "kitten"),
    "horse": ("says neigh", "on a farm", "grass", "four", "run fast", "foal"),
    "cow": ("says moo", "on a farm", "grass", "four", "give milk", "calf"),
    "sheep": ("says baa", "on a farm", "grass", "four", "give wool", "lamb"),
    "goat": ("says maa", "on a hill", "leaves", "four", "climb rocks", "kid"),
    "hen": ("says cluck", "on a farm", "seeds", "two", "lay eggs", "chick"),
    "duck": ("says quack", "by the lake", "bread", "two", "swim and fly", "duckling"),
    "pig": ("says oink", "on a farm", "apples", "four", "roll in the mud", "piglet"),
    "frog": ("says croak", "by the lake", "flies", "four", "jump high", "tadpole"),
    "mouse": ("says squeak", "in a hole", "cheese", "four", "hide well", "pup"),
    "owl": ("says hoot", "in a tree", "mice", "two", "see in the dark", "owlet"),
    "bear": ("growls", "in the forest", "honey", "four", "climb trees", "cub"),
    "wolf": ("howls", "in the forest", "meat", "four", "run fast", "cub"),
    "fox": ("barks", "in the forest", "eggs", "four", "hide well", "cub"),
    "rabbit": ("is quiet", "in a hole", "carrots", "four", "jump high", "kit"),
    "bird": ("sings", "in a nest", "seeds", "two", "fly", "chick"),
    "fish": ("is quiet", "in the river", "plants", "no", "swim", "fry"),
    "bee": ("buzzes", "in a hive", "honey", "six", "fly", "grub"),
    "lion": ("roars", "on the plain", "meat", "four", "run fast", "cub"),
    "turtle": ("is quiet", "by the sea", "plants", "four", "swim", "hatchling"),
}
FOODS = "soup bread cake cheese rice pie fish salad honey toast jam butter".split()
DRINKS = "milk tea juice water".split()
FRUITS = [("apple", "apples"), ("pear", "pears"), ("egg", "eggs"), ("cookie", "cookies"), ("banana", "bananas"),
          ("carrot", "carrots"), ("plum", "plums"), ("potato", "potatoes")]
PLACES = ("park market beach forest school library river farm garden hill lake town village station museum bakery "
          "castle island harbour field").split()
OBJECTS = ("ball kite book hat coat cup box lamp key boat drum bell bag chair toy doll map ring clock basket umbrella "
           "pencil bottle ladder").split()
COLOURS = "red blue green yellow black white brown grey orange purple pink golden".split()
NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
           "seventeen eighteen nineteen twenty").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
OPPOSITES = [("hot", "cold"), ("big", "small"), ("happy", "sad"), ("fast", "slow"), ("old", "young"), ("day", "night"),
             ("good", "bad"), ("open", "closed"), ("wet", "dry"), ("loud", "quiet"), ("light", "dark"), ("up", "down"),
             ("clean", "dirty"), ("hard", "soft"), ("full", "empty"), ("long", "short"), ("early", "late"),
             ("rich", "poor"), ("strong", "weak"), ("kind", "unkind"), ("first", "last"), ("left", "right")]
COLOUR_OF = [("the sky", "blue"), ("grass", "green"), ("snow", "white"), ("the night", "black"), ("the sun", "yellow"),
             ("milk", "white"), ("a carrot", "orange"), ("a plum", "purple"), ("a lemon", "yellow"),
             ("an elephant", "grey"), ("chocolate", "brown"), ("a leaf", "green"), ("honey", "golden"),
             ("a cloud", "white"), ("the sea", "blue"), ("a rose", "red"), ("coal", "black"), ("a pig", "pink")]
GOOD_FEELINGS = "happy proud excited calm glad cheerful pleased grateful".split()
BAD_FEELINGS = "sad angry tired scared lonely worried bored upset nervous".split()
SIZES = "little big small tall young old clever brave shy kind lazy funny gentle quiet careful hungry".split()
WEATHER = ["sunny", "rainy", "windy", "snowy", "cloudy", "cold", "warm", "hot", "foggy", "stormy"]
WEATHER_IS = {"sunny": "the sun was shining", "rainy": "the rain was falling", "windy": "the wind was strong",
              "snowy": "the snow was falling", "cloudy": "the sky was grey", "cold": "the air was cold",
              "warm": "the air was warm", "hot": "the sun was very hot", "foggy": "nobody could see far",
              "stormy": "there was thunder in the sky"}

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_NAME = re.compile(r"\{(\w+)\}")


def fill(template, env, rng):
    """Fills `{name}` from `env` (`{Name}`: with a capital) and picks one of each `[a|b|c]`, innermost first."""
    text = template
    while True:
        found = _CHOICE.search(text)
        if not found:
            break
        text = text[:found.start()] + rng.pick(found.group(1).split("|")) + text[found.end():]

    def value(match):
        key = match.group(1)
        if key in env:
            return env[key]
        word = env[key[0].lower() + key[1:]]
        return word[0].upper() + word[1:]

    return tidy(_NAME.sub(value, text))


def tidy(text):
    """Single spaces, `an` before a vowel, the preposition that a place takes, and a capital where a sentence starts."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r"\b(at|in) the (hill|beach|farm|island)\b", r"on the \2", text)
    text = re.sub(r"\bat the (park|forest|garden|town|village|field)\b", r"in the \1", text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return capitals(text)


def capitals(text):
    return re.sub(r"(^|[.!?] |\n)([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def sentences(text):
    """Splits at sentence ends, keeping a quote's words with the words that say who spoke."""
    return re.findall(r'(?:"[^"]*"|[^".!?])+(?:[.!?]+|$)', text)


def person(rng, besides=()):
    """A person as template variables: name and pronouns."""
    name = rng.pick([n for n in BOYS + GIRLS if n not in besides])
    return pronouns(name, name in BOYS)


def pronouns(name, male):
    if male:
        return {"h": name, "he": "he", "him": "him", "his": "his"}
    return {"h": name, "he": "she", "him": "her", "his": "her"}


def scene(rng):
    """Template variables for one text: a hero, a friend, and different things, places and foods."""
    env = person(rng)
    friend = person(rng, (env["h"],))
    env.update({key + "2": word for key, word in friend.items()})
    relative, he = rng.pick(FAMILY)
    env.update(family=relative, fhe=he, fhim="her" if he == "she" else "him", fhis="her" if he == "she" else "his")
    for key, words, count in [("place", PLACES, 3), ("obj", OBJECTS, 4), ("food", FOODS, 3), ("colour", COLOURS, 3),
                              ("pet", PETS, 2), ("animal", list(ANIMALS), 3), ("job", JOBS, 2), ("drink", DRINKS, 2),
                              ("size", SIZES, 2), ("good", GOOD_FEELINGS, 2), ("bad", BAD_FEELINGS, 2)]:
        for at, word in enumerate(rng.sample(words, count)):
            env[key + ("" if at == 0 else str(at + 1))] = word
    one, many = rng.pick(FRUITS)
    two, manies = rng.pick([pair for pair in FRUITS if pair[0] != one])
    number = 2 + rng.below(9)
    env.update(fruit=one, fruits=many, fruit2=two, fruits2=manies, n=NUMBERS[number], n1=NUMBERS[number + 1],
               n0=NUMBERS[number - 1], day=rng.pick(DAYS), month=rng.pick(MONTHS),
               time=rng.pick(["morning", "afternoon", "evening"]))
    env["weather"] = rng.pick(WEATHER)
    env["weatheris"] = WEATHER_IS[env["weather"]]
    return env
