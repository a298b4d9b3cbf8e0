"""TODO docstring."""
import re


def read_captions(text):
    """captions.txt -> list of captions: a line an object, its synonyms behind |, "COLOUR car" once for each colour."""
    colours = re.search(r"^# COLOUR is one of (.*)$", text, re.M)
    captions = []
    for line in text.splitlines():
        for caption in line.split("|") if line[:1] not in "#" else []:
            each = colours[1].split() if "COLOUR" in caption and colours else [""]
            captions += [caption.strip().replace("COLOUR", colour) for colour in each]
    return list(dict.fromkeys(captions))


def plain(prompt):
    """A prompt without capitals, articles and phrases such as "a picture of"."""
    words = re.sub(r"[\W_]+", " ", prompt.lower())  # letters of every script are kept: they make another prompt
    words = re.sub(r"^ *((an?|the) +)?((picture|drawing|emoji|photo|image|icon) +of +)?((an?|the) +)?", "", words)
    return " ".join(words.split())
