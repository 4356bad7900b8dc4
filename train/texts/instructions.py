"""Instructions as people give them to an assistant, made of patterns: free to use.

Emails, stories, advice, explanations, comparisons, plans, lists, short questions: the kinds that
conversations, code and prose hardly hold. Their answers come from `mtd distill-data`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

_THINGS = """
    the water cycle|photosynthesis|black holes|volcanoes|the Roman Empire|the French Revolution
    electric cars|solar power|the internet|machine learning|vaccines|the immune system|earthquakes
    climate change|the stock market|inflation|supply and demand|jazz|impressionism|chess|football
    gardening|baking bread|coffee|tea|honey bees|whales|dogs|cats|penguins|owls|dinosaurs|oak trees
    mountains|deserts|rain forests|coral reefs|rivers|the moon|Mars|comets|gravity|magnets|light
    sound|batteries|bridges|bicycles|trains|airplanes|ships|clocks|telescopes|libraries|museums
    schools|hospitals|friendship|courage|patience|honesty|teamwork|leadership|creativity|happiness
    sleep|exercise|a healthy diet|meditation|time management|public speaking|saving money
    job interviews|remote work|learning a language|playing the guitar|photography|painting
    camping|travelling alone|moving to a new city|raising children|growing older|city life
    life in the countryside|winter|summer|rain|the sea|democracy|human rights|recycling
    plastic waste|clean water|space exploration|robots|video games|social media|books|poetry
    theatre|cinema|mythology|philosophy|mathematics|statistics|chemistry|genetics|the heart
    the brain|the human eye|bones|dreams|memory|colours|salt|sugar|chocolate|cheese|rice|wool
"""
_PLACES = """
    Paris|Rome|Tokyo|Cairo|New York|London|Sydney|Istanbul|Mexico City|Nairobi|Berlin|Lisbon
    Madeira|Iceland|Norway|Peru|India|Canada|Greece|Morocco|Vietnam|Scotland|Kyoto|Venice
"""
_PEOPLE = """
    a teacher|a doctor|your landlord|a new colleague|your manager|a customer|a neighbour|a friend
    your sister|a local newspaper|a hotel|a restaurant|a travel agency|the city council|a librarian
    a software team|your football coach|a charity|a job applicant|your bank
"""
_REASONS = """
    asking for a meeting next week|thanking them for their help|apologising for a delay
    complaining politely about noise|inviting them to a birthday party|asking for more information
    saying that you will be ill tomorrow|suggesting an improvement|asking for feedback on a report
    announcing a change of plans|recommending a book|asking for a refund
"""
_ABOUT_THINGS = (
    "Explain {} to a ten-year-old.",
    "Write a short story about {}.",
    "Write a poem about {}.",
    "Give me five interesting facts about {}.",
    "What are the main advantages and disadvantages of {}?",
    "Write a blog post of three paragraphs about {}.",
    "Why does {} matter? Answer in a few sentences.",
    "List ten words that come to mind when thinking of {}, and say why.",
    "Imagine you are an expert on {}. What common mistake would you warn people about?",
    "Write a dialogue between two friends who disagree about {}.",
    "What is the history of {}?",
    "How would you introduce {} in a speech of one minute?",
    "Suggest three questions for a quiz about {}, with answers.",
    "Describe {} without using its name.",
)
_ABOUT_PLACES = (
    "Plan a weekend trip to {}.",
    "What should I see on my first day in {}?",
    "Write a postcard from {}.",
    "What is the weather like in {} in spring, and what should I pack?",
    "Where is {}, and what is it known for?",
    "Compare living in {} with living in a small village.",
)


def instructions() -> Iterator[tuple[str, str]]:
    """Pairs of an id and a user turn, always the same ones in the same order."""
    patterns = (
        ("thing", _ABOUT_THINGS, _THINGS),
        ("place", _ABOUT_PLACES, _PLACES),
        ("email", tuple(f"Write an email to {who}, {{}}." for who in _listed(_PEOPLE)), _REASONS),
    )
    for kind, sentences, words in patterns:
        pairs = itertools.product(enumerate(sentences), enumerate(_listed(words)))
        for (i, sentence), (j, word) in pairs:
            yield f"instructions/{kind}-{i}-{j}", sentence.format(word)


def _listed(text: str) -> list[str]:
    return [item.strip() for line in text.strip().splitlines() for item in line.split("|")]
