"""Captions that a small model was trained on: reading the list, and prompts in its plain form."""
import re

COLOUR_WORDS = frozenset("red orange yellow green blue purple pink brown white grey gray black golden silver turquoise "
                         "cyan violet beige".split())

def read_captions(text):
    """captions.txt -> list of captions.

    A line has an object and its synonyms, separated by |. "COLOUR car" stands for a caption in each colour that the
    comment "# COLOUR is one of ..." lists.
    """
    colours = re.search(r"^# COLOUR is one of (.*)$", text, re.M)
    captions = []
    for line in text.splitlines():
        for caption in line.split("|") if line[:1] not in "#" else []:
            each = colours[1].split() if "COLOUR" in caption and colours else [""]
            captions += [caption.strip().replace("COLOUR", colour) for colour in each]
    return list(dict.fromkeys(captions))


def plain(prompt):
    """A prompt in lower case without punctuation, leading articles and phrases such as "a picture of"."""
    words = re.sub(r"[\W_]+", " ", prompt.lower())  # keeps the letters of every script, which distinguish prompts
    words = re.sub(r"^ *((an?|the) +)?((picture|drawing|emoji|photo|image|icon) +of +)?((an?|the) +)?", "", words)
    return " ".join(words.split())


def recolours(source, target):
    """Whether two prompts differ in a colour alone: "red heart" and "blue heart", or "umbrella" and "red umbrella"."""
    before, after = (plain(prompt).split() for prompt in (source, target))
    things = [[word for word in words if word not in COLOUR_WORDS] for words in (before, after)]
    return before != after and things[0] == things[1] != []
