"""Templates for stories, facts, dialogues, lists and chats. `{h}` is the hero, `{he}` the pronoun; `2` marks a second one."""

from world import (ANIMALS, BAD_FEELINGS, BOYS, COLOUR_OF, COLOURS, DAYS, DRINKS, FOODS, GIRLS, GOOD_FEELINGS, JOBS, MONTHS, NUMBERS,
                   OBJECTS, OPPOSITES, PETS, PLACES, SIZES, WEATHER, article, fill, person, pronouns, scene, tidy)

PERSON_OPENINGS = [
    "One {day} {time} {h} went to the {place}.",
    "{h} lived in a [small|big|quiet] {colour} house near the {place}.",
    "It was a {weather} day and {h} was {bad}.",
    "It was a {weather} {time} in {month}. {h} was at the {place}.",
    "Once upon a time there was a {size} [boy|child] named {h}.",
    "{h} and {h2} were good friends.",
    "{h} had a {size} {animal} named {pet}.",
    "{h} wanted to go to the {place} with {his} {family}.",
    "{h} was a {size} {job} who lived by the {place}.",
    "One day {h} found a {colour} {obj} at the {place}.",
    "{h} and {his} {family} walked through the {place} on a {weather} {time}.",
    "Every {day} {h} helped the {job} in the {place}.",
    "Long ago, in a {size2} village by the sea, there lived a {job} called {h}.",
    "{h} woke up early on {day} and looked out of the window.",
]
ANIMAL_OPENINGS = [
    "Once upon a time there was a {size} {animal} named {h}.",
    "{h} was a {size} {colour} {animal} who lived near the {place}.",
    "A {size} {animal} named {h} lived by the {place}.",
    "One {weather} {time} a {colour} {animal} named {h} walked to the {place}.",
    "There was once a {animal} called {h}. {He} was very {size}.",
    "{h} the {animal} had a {colour} {obj}.",
]
# What happens; each works for a person and for an animal.
EVENTS = [
    "{He} wanted to find a {colour2} {obj2}. {He} looked in the {place2}, but it was not there. Then {he} looked [under the table|behind a tree|in a box]. There it was!",
    "{He} was very hungry. {He} asked {h2} for [some|a little] {food}. {h2} [smiled and said yes|gave {him} the {food}|shared it with {him}]. They ate it together.",
    "[Suddenly|Then] it began to rain. {h} had no {obj2}, so {he} ran to the {place2}. {He} was wet and cold. {h2} gave {him} a cup of hot {drink}.",
    "{He} met a {size2} {animal2} named {pet}. The {animal2} was lost and {bad}. {h} helped {pet} find the way home.",
    "{He} saw a {colour2} {obj2} near the {place2}. [It was very old|It was new and bright|It was small but beautiful]. {h} took it home and showed it to {h2}.",
    "{He} lost {his} {colour2} {obj2} at the {place2}. {He} was {bad2} and began to cry. {h2} looked everywhere. At last {he2} found it [under a bench|in the tall grass|behind a door].",
    "{He} wanted to make some {food} for {h2}. {He} needed {n} {fruits} and some {drink}. {He} worked all {time}. It was [delicious|very good|perfect].",
    "{He} heard a loud noise in the dark. {He} was scared. But it was only {h2} with a {obj2}. They both laughed.",
    "{He} tried to climb a tall tree, but it was too hard. {He} fell down and hurt {his} leg. {h2} came quickly and helped {him}. Soon {he} felt better.",
    "{He} planted {n} seeds in the garden. Every day {he} gave them water. After many days there were {n} {colour2} flowers. {h2} said they were beautiful.",
    "{He} wanted to learn to [swim|sing|dance|paint|fly a kite|play the drum]. At first it was hard. {He} tried again and again. In the end {he} could do it very well.",
    "{He} and {h2} had a race to the {place2}. {h2} was fast, but {h} was faster. {h} won the race and got a {colour2} {obj2}.",
    "{He} took a {colour2} boat across the {rivlake}. The wind was strong and the waves were high. {He} was [brave|scared|careful]. At last {he} came to a small island.",
    "{He} found a map in an old box. The map showed a way to the {place2}. {He} followed it with {h2}. There they found a box full of [gold|cookies|old books|bright stones].",
    "{He} bought {n} {fruits} at the market. {He} gave one to {h2}. Now {he} had only {n0} {fruits}. {He} did not mind.",
    "{He} had a bad dream and could not sleep. {h2} told {him} a story about a {size2} {animal2}. Soon {he} closed {his} eyes and slept.",
    "It was {his} birthday. {h2} gave {him} a {colour2} {obj2}. There was {food} and {food2} for everyone. They sang and danced all {time}.",
    "{He} broke the {obj2} of {h2}. {He} was sorry and told the truth. {h2} was not angry. They fixed the {obj2} together.",
    "{He} did not like {food}. {h2} said, \"Try it, please.\" {h} tried a little. It was good! Now {he} eats {food} every {day}.",
    "{He} did not want to go to the {place2}. It was [dark|dirty|noisy|cold] there and nobody was kind to {him}. {h2} said, \"I will go with you.\" Then {h} was not afraid.",
    "{He} saw {n} [birds|cats|ducks|rabbits|frogs|goats] at the {place2}. One of them was {colour2}. {He} gave it some {food}. It was so {good} that it followed {him} home.",
    "{He} was {bad2} because nobody wanted to play. Then {h2} came with a {colour2} ball. They played until the sun went down.",
    "{He} had {n} {colour2} stones. {h2} gave {him} one more. Now {he} had {n1} stones.",
    "The {family} of {h2} was sick. {h} made hot soup and took it to the house. [It was a kind thing to do|The soup was good and warm]. Soon everyone was well again.",
    "{He} painted a picture of a {colour2} {animal2}. It was not very good, but {h2} loved it. {He2} put it on the wall.",
    "{He} went up the hill with {h2} to see the [moon|stars|sunset]. They sat on a soft blanket and drank {drink}. The sky was full of light.",
    "A strong wind took {his} hat away. {He} ran after it across the {place2}. {h2} caught it just in time. \"Here you are,\" said {he2}.",
    "{He} wrote a long letter to {h2}. {He} told {him2} about the {place2} and the {size2} {animal2} there. After {n} days {h2} wrote back.",
    "{He} built a [house|tower|bridge] of {n} {colour2} [blocks|stones|boxes]. It was taller than {h2}. Then the {animal2} knocked it down. {h} began again.",
    "The {obj2} was too heavy to carry. {He} pushed and pulled, but it did not move. Then {h2} helped, and together they were strong.",
    "{He} counted the [stars|clouds|birds|boats] with {h2}. {h} saw {n}, but {h2} saw only {n0}. They counted again and laughed.",
    "{He} worked hard in the {place2} from morning to evening. {h2} brought {him} {food} and {drink}. The work was finished before night.",
    "There was a [fair|show|feast] in the {place2}. {He} saw a {animal2} that could [dance|count|sing|paint]. Everybody clapped. {h} clapped too.",
    "{He} and {h2} could not agree. {h} wanted {food} and {h2} wanted {food2}. In the end they ate both, and nobody was {bad2}.",
    "{He} hid behind a big tree. {h2} counted to {n} and looked for {him}. {He2} looked high and low. At last {he2} heard {him} laugh.",
    "{He} kept a secret in a {colour2} box. {h2} asked what was inside. {h} opened it slowly. Inside there was a [tiny|shiny|beautiful] {obj2}.",
    "The bridge over the {rivlake} was broken. {He} could not cross. {h2} showed {him} another way through the {place2}. It was long but safe.",
    "{He} got up very early to catch the train. {He} ran to the station with {his} {colour2} bag. The train was late, so {he} waited with {h2}.",
    "A {ruler} came to the {place2} on a white horse. {He} was too shy to speak. {h2} gave the {ruler} some {food}. \"How kind you are!\" said the {ruler}.",
    "{He} forgot to close the door. The {animal2} ran out into the street. {h} and {h2} followed it to the {place2} and brought it back.",
    "The lights went out and the room was dark. {He} found a {colour2} lamp. {h2} told a funny story until the lights came back.",
    "{He} made a wish under the [old|tall|apple] tree. {He} wished for a {colour2} {obj2}. The next morning it was there. {h2} only smiled.",
    "{He} fell into the cold water. {h2} threw {him} a rope and pulled {him} out. They sat by the warm fire until {he} was dry.",
]
TALK = [
    "\"Where are you going?\" asked {h2}. \"I am going to the {place2},\" said {h}.",
    "\"What is that?\" asked {h2}. \"It is a {colour3} {obj3},\" said {h}.",
    "\"Can you help me?\" asked {h}. \"[Yes, of course|Yes, I can|I will try],\" said {h2}.",
    "\"I am [hungry|thirsty|tired],\" said {h}. \"[Here is some {food2}|Have some {drink}|Let us sit down],\" said {h2}.",
    "\"Look at the {animal2}!\" said {h2}. \"It is so [big|small|beautiful|funny],\" said {h}.",
    "{h2} said, \"I like your {obj}.\" \"Thank you,\" said {h}.",
    "\"Do you like {food2}?\" asked {h2}. \"[Yes, I love it|No, I do not like it],\" said {h}.",
    "\"How many {fruits2} do you have?\" asked {h2}. \"I have {n} {fruits2},\" said {h}.",
    "\"How are you today?\" asked {h2}. \"I am {good2},\" said {h}.",
    "\"Please come with me,\" said {h2}. \"[I would love to|I can not come today]!\" said {h}.",
    "\"What did you do yesterday?\" asked {h2}. \"I [read a book|played with my {animal3}|helped my {family}|cooked some {food2}],\" said {h}.",
    "\"I think it will [rain|snow|be sunny] tomorrow,\" said {h2}. \"I hope [so|not],\" said {h}.",
    "\"Whose {obj3} is this?\" asked {h}. \"It is mine,\" said {h2}. \"It belongs to my {family}.\"",
    "\"When will we go home?\" asked {h2}. \"[Soon|Not yet|After dinner|Before dark],\" said {h}.",
    "\"Why are you {bad2}?\" asked {h2}. \"[I lost my {obj3}|Nobody wants to play|I miss my {family}|I can not sleep],\" said {h}.",
]
ENDINGS = [
    "{h} was very {good}.", "{h} and {h2} were {good} all day.", "{He} went home and told {his} [friends|family] about it.",
    "It was a [good|wonderful|long|lovely] day.", "They were friends for ever.", "In the evening {he} was tired but {good}.",
    "{h} said thank you and smiled.", "From that day on {h} was never {bad} again.", "Then {he} went to bed and slept well.",
    "{h} learned that it is good to [share|help others|tell the truth|be kind|try again].", "And that was the end of it.",
    "\"What a day!\" said {h}.", "{He} could not wait to come back.",
    "{He} kept the {obj2} for many years.", "Everyone in the {place} talked about it.", "{h2} gave {him} a big hug.",
    "And every {day} after that they met again.", "The next day everything was different.", "{He} laughed, and {h2} laughed too.",
]
PIRATE = [
    "The pirate captain had a black ship. \"[Ahoy|Arr|Shiver me timbers|Blow me down], me hearties!\" said the captain. \"[We be sailing to the ship|We be sailing to the island|There be treasure on the island|Raise the sails]!\" \"Aye, captain!\" said {h}.",
    "A pirate came to the {place}. \"Ahoy, matey!\" said the pirate. \"Have ye seen me {colour} {obj}?\" \"No,\" said {h}. \"[Arr|Ahoy|Aye]! [Blow me down|Shiver me timbers|Yo ho ho], [says I|matey|me hearties]!\" said the pirate.",
    "\"Yo ho ho!\" sang the pirate. \"I be a pirate and I love the sea.\" {h} laughed and sang too. \"Aye, ye be a fine [lad|lass|sailor]!\" said the pirate.",
    "The pirate had a parrot named {pet}. \"Pieces of gold! Pieces of gold!\" said the parrot. \"Shiver me timbers!\" said the pirate. \"That be a mighty clever bird.\"",
    "{h} dreamed of a pirate ship. \"Where be me treasure?\" asked the pirate. \"It is [under the old tree|at the {place}|by the {place}],\" said {h}. \"Arr, thank ye, matey,\" said the pirate.",
]
RHYMES = [
    "The {size} cat sat on the mat,\nand wore a {colour} little hat.", "The sun is high, the sky is blue,\nI made a cup of tea for you.",
    "The moon is bright, the night is long,\nthe {colour} bird sings us a song.", "A {size} mouse lived in a house,\nand {he} was such a happy mouse.",
    "The frog sat on a log all day,\nand in the night {he} went away.", "I have a {obj}, I have a {obj2},\nI have a friend, and that is you.",
    "The rain came down, the wind blew fast,\nbut now the storm is gone at last.", "The bee can buzz, the bird can sing,\nand {h} can dance in a golden ring.",
    "One, two, three, come play with me.\nFour, five, six, pick up the sticks.", "The king came home, the queen was glad,\nand nobody at all was sad.",
]


def hero_scene(rng):
    """A scene whose hero is a person or an animal, with an opening that fits."""
    env = scene(rng)
    env.update(rivlake=rng.pick(["river", "lake"]), ruler=rng.pick(["king", "queen"]))
    if rng.chance(45):
        env.update(pronouns(env["pet2"], rng.chance(50)))
        opening = rng.pick(ANIMAL_OPENINGS)
    else:
        opening = rng.pick(PERSON_OPENINGS)
    if "[boy|child]" in opening:
        opening = opening.replace("[boy|child]", "boy" if env["h"] in BOYS else "girl")
    return env, fill(opening, env, rng)


def story(rng, events=2):
    """A story as its opening and what follows."""
    env, opening = hero_scene(rng)
    parts = []
    if rng.chance(25):
        parts.append(fill("{Weatheris}. ", env, rng))
    for at, event in enumerate(rng.sample(EVENTS, events)):
        parts.append(fill(event, env, rng))
        if rng.chance(35):
            parts.append(fill(rng.pick(TALK), env, rng))
        # The next event happens with other things.
        fresh = scene(rng)
        for key in ("obj2", "colour2", "place2", "food", "food2", "animal2", "n", "n0", "n1", "fruits", "fruits2", "bad2", "obj3", "colour3", "pet"):
            if key != "pet" or env["h"] != fresh["pet"]:
                env[key] = fresh[key]
    parts.append(fill(rng.pick(ENDINGS), env, rng))
    return opening, tidy(" ".join(parts))


def full_story(rng):
    opening, rest = story(rng, 1 + rng.below(2))
    return opening + " " + rest


def fact(rng):
    """One or two true sentences."""
    kind = rng.below(9)
    if kind < 4:
        name = rng.pick(list(ANIMALS))
        sound, home, food, legs, can, young = ANIMALS[name]
        lines = [f"A {name} {sound}.", f"A {name} lives {home}.", f"A {name} eats {food}.",
                 f"A {name} has {legs} legs.", f"A {name} can {can}.", f"A young {name} is called a {young}."]
        return " ".join(tidy(line) for line in rng.sample(lines, 1 + rng.below(3)))
    if kind == 4:
        one, two = rng.pick(OPPOSITES)
        return rng.pick([f"The opposite of {one} is {two}.", f"The opposite of {two} is {one}."])
    if kind == 5:
        thing, colour = rng.pick(COLOUR_OF)
        return tidy(f"The colour of {thing} is {colour}." if rng.chance(50) else f"{thing} is {colour}.")
    if kind == 6:
        names = rng.pick([DAYS, MONTHS])
        at = rng.below(len(names) - 1)
        return rng.pick([f"{names[at + 1]} comes after {names[at]}.", f"{names[at]} comes before {names[at + 1]}."])
    if kind == 7:
        return sum_text(rng)
    return rng.pick(["There are seven days in a week.", "There are twelve months in a year.", "A positive number is more than zero.",
                     "A negative number is less than zero.", "Fish live in water.", "The sun rises in the morning.",
                     "The moon shines at night.", "It is cold in winter and hot in summer.", "Leaves fall in autumn.",
                     "Flowers grow in spring.", "A negative answer is no. A positive answer is yes.", "A sentiment is a feeling.", "Rain falls from the clouds.",
                     "Bread is made by the baker.", "A doctor helps sick people.", "A sailor works on a ship.", "A farmer works on a farm."])


def sum_text(rng):
    one, two = rng.below(11), rng.below(11)
    if rng.chance(60):
        return f"{NUMBERS[one]} plus {NUMBERS[two]} is {NUMBERS[one + two]}.".capitalize()
    return f"{NUMBERS[one + two]} minus {NUMBERS[two]} is {NUMBERS[one]}.".capitalize()


def question(rng):
    """A question about the world and its answer, a full sentence."""
    kind = rng.below(8)
    name = rng.pick(list(ANIMALS))
    sound, home, food, legs, can, young = ANIMALS[name]
    if kind < 3:
        return [(f"What does a {name} eat?", f"A {name} eats {food}."), (f"Where does a {name} live?", f"A {name} lives {home}."),
                (f"How many legs does a {name} have?", f"A {name} has {legs} legs."), (f"What can a {name} do?", f"A {name} can {can}."),
                (f"What is a young {name} called?", f"A young {name} is called a {young}.")][rng.below(5)]
    if kind == 3:
        one, two = rng.pick(OPPOSITES)
        one, two = (one, two) if rng.chance(50) else (two, one)
        return f"What is the opposite of {one}?", f"The opposite of {one} is {two}."
    if kind == 4:
        thing, colour = rng.pick(COLOUR_OF)
        return f"What is the colour of {thing}?", f"The colour of {thing} is {colour}."
    if kind == 5:
        names = rng.pick([DAYS, MONTHS])
        at = rng.below(len(names) - 1)
        return f"What comes after {names[at]}?", f"{names[at + 1]} comes after {names[at]}."
    text = sum_text(rng)
    return f"What is {text[0].lower()}{text[1:text.index(' is ')]}?", text


def happenings(rng, count):
    """`count` small events of different people, as (name, he, verb, colour, object, place) and the verb's base form."""
    verbs = rng.sample([("found", "find"), ("bought", "buy"), ("lost", "lose"), ("painted", "paint"), ("broke", "break"),
                        ("hid", "hide"), ("made", "make"), ("saw", "see")], count)
    places, objects, colours = rng.sample(PLACES, count), rng.sample(OBJECTS, count), rng.sample(COLOURS, count)
    out, used = [], []
    for at in range(count):
        who = person(rng, used)
        used.append(who["h"])
        out.append((who["h"], who["he"], verbs[at], colours[at], objects[at], places[at]))
    return out


def reading(rng):
    """A passage and questions about it, answered in full sentences."""
    events = happenings(rng, 2 + rng.below(2))
    text = " ".join(tidy(f"{h} {verb[0]} a {colour} {obj} at the {place}.") for h, _, verb, colour, obj, place in events)
    pairs = []
    for h, he, verb, colour, obj, place in rng.sample(events, len(events)):
        pairs.append(rng.pick([
            (f"Who {verb[0]} the {obj}?", f"{h} {verb[0]} the {obj}."),
            (f"Where did {h} {verb[1]} the {obj}?", tidy(f"{he} {verb[0]} it at the {place}.")),
            (f"What did {h} {verb[1]}?", tidy(f"{he} {verb[0]} a {colour} {obj}.")),
            (f"What colour was the {obj}?", f"The {obj} was {colour}."),
            (tidy(f"Who was at the {place}?"), tidy(f"{h} was at the {place}.")),
        ]))
    return text, pairs


WORDS = (OBJECTS + FOODS + DRINKS + COLOURS + PLACES + list(ANIMALS) + DAYS + MONTHS + NUMBERS + BOYS + GIRLS + PETS + JOBS + SIZES +
         GOOD_FEELINGS + BAD_FEELINGS + WEATHER)


def drill(rng):
    """Random words, three times over: only looking back tells what comes next (Olsson et al. 2022, "In-context Learning and
    Induction Heads")."""
    said = " ".join(rng.sample(WORDS, 14 + rng.below(8)))
    return f"{said}.\n{said}.\n{said}."


def lesson(rng):
    """Somebody says words and somebody says them again."""
    env = scene(rng)
    said = " ".join(rng.sample(WORDS, 4 + rng.below(9)))
    who = fill(rng.pick(["The teacher", "The {job}", "The {family} of {h2}"]), env, rng)
    return rng.pick([
        f'{who} said: "{said}." {env["h"]} said: "{said}." {env["h2"]} said: "{said}."',
        f'{who} wrote: "{said}." Then {env["h"]} read: "{said}."',
        f'{env["h"]} had these words: {said}. {env["h2"]} had the same words: {said}.',
        f'Say again: {said}.\nAnswer: {said}.\nSay again: {said}.\nAnswer: {said}.',
    ])


def listing(rng):
    """A heading and a list."""
    heads = [("Things to buy", FOODS), ("Animals", list(ANIMALS)), ("Colours", COLOURS), ("Places to see", PLACES), ("Things in the box", OBJECTS)]
    head, words = rng.pick(heads)
    return head + ":\n" + "\n".join("- " + word for word in rng.sample(words, 3 + rng.below(3)))


def letter(rng):
    env = scene(rng)
    return fill("Dear {h2},\n[How are you?|I hope you are well.|Thank you for the {obj}.] [I am at the {place} with my {family}.|Yesterday we went to the {place}.|"
                "Today it is {weather} here.] [I saw a {colour} {animal}.|I ate {food} and {food2}.|I have a new {colour2} {obj2}.] "
                "[It was wonderful.|I am very {good}.|I am a little {bad}.|Please write to me soon.|Come and visit us on {day}.]\nYour friend,\n{h}", env, rng)


def dialogue(rng):
    env = scene(rng)
    env["rivlake"] = "river"
    lines = [fill(talk, env, rng) for talk in rng.sample(TALK, 2 + rng.below(2))]
    return fill("{h} met {h2} at the {place}. \"[Hello|Good morning|Good evening], {h2},\" said {h}. ", env, rng) + " " + " ".join(lines) + " " + \
        fill("\"[Goodbye|See you soon|Good night], {h2}!\" said {h}.", env, rng)


def saying(rng):
    text = fill("{h} {verb} a {colour} {obj}.", scene(rng) | {"verb": rng.pick(["has", "found", "saw", "likes"])}, rng)
    return "Say: " + text, text


def chat(rng):
    """(user, assistant) turns of one conversation."""
    kind = rng.below(10)
    if kind < 3:
        env, opening = hero_scene(rng)
        text = opening + " " + fill(rng.pick(EVENTS), env, rng) + " " + fill(rng.pick(ENDINGS), env, rng)
        subject = env["animal"] if f" {env['animal']} " in opening else env["h"]
        if subject == env["animal"]:
            subject = article(subject)
        return [(rng.pick([f"Tell me a story about {subject}.", f"Please tell me a little story about {subject}."]), text)]
    if kind < 6:
        pairs = [question(rng)]
        if rng.chance(40):
            pairs.append(question(rng))
        return pairs
    if kind == 6:
        head, words = rng.pick([("animals", list(ANIMALS)), ("colours", COLOURS), ("foods", FOODS), ("places", PLACES)])
        count = 2 + rng.below(4)
        chosen = rng.sample(words, count)
        return [(f"Name {NUMBERS[count]} {head}.", ", ".join(chosen[:-1]).capitalize() + " and " + chosen[-1] + ".")]
    if kind == 7:
        text, pairs = reading(rng)
        return [(text + " " + pairs[0][0], pairs[0][1])]
    if kind == 8:
        start = rng.below(8)
        stop = start + 2 + rng.below(6)
        return [(f"Count from {NUMBERS[start]} to {NUMBERS[stop]}.", ", ".join(NUMBERS[start:stop + 1]).capitalize() + ".")]
    env = scene(rng)
    return [rng.pick([("Hello!", "Hello! How can I help you?"), ("Who are you?", "I am a small model. I know little stories."),
                      ("Thank you!", "You are welcome."), ("How are you?", "I am well, thank you."),
                      (fill("I am {bad}.", env, rng), "I am sorry. I hope you feel better soon."),
                      (fill("I am {good}!", env, rng), "That is wonderful! I am glad."),
                      (fill("Write a sentence about a {animal}.", env, rng), fill("The {animal} is at the {place}.", env, rng)),
                      saying(rng)])]


def pirates(rng):
    env = scene(rng)
    return fill(rng.pick(PERSON_OPENINGS[:3]), env, rng) + " " + " ".join(fill(text, env, rng) for text in rng.sample(PIRATE, 1 + rng.below(2)))


def rhyme(rng):
    env = scene(rng)
    return "\n".join(fill(text, env, rng) for text in rng.sample(RHYMES, 1 + rng.below(3)))

