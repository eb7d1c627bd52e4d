"""The wording of the alignment tasks: ten to twenty templates for every variant of a task, kept as data.

A template is the user's message with placeholders in braces:

    {history}      semantic IDs of the latest items, one after the other
    {titles}       their titles, numbered, one a line
    {item}         semantic ID of one item
    {title}, {description}      text of one item
    {preference}, {query}       what a user likes, and what a user asks for

A variant is named after the parts that it puts in, joined by "+"; those of `index_to_item` after the parts that it asks
for.
"""

from __future__ import annotations

ALIGNMENT_SYSTEM_PROMPT = "Answer about the items of the catalogue and the people who use them."

# The first one is the message of direct mode: the history and nothing else.
_NEXT_ITEM = (
    "{history}",
    "The history is {history}. Name the item that follows.",
    "Someone had these items, oldest first: {history}. What comes next?",
    "Continue this sequence by one item: {history}",
    "Items so far: {history}\nNext item:",
    "After {history}, which item would this person choose?",
    "A customer went through {history} in this order. Recommend one more item.",
    "Given the record {history}, predict the next entry.",
    "Which item fits best behind {history}?",
    "Here is what a user picked over time: {history}. Give the semantic ID of the next pick.",
    "I have had {history}. What should I have next?",
    "Find the item that a user with the history {history} turns to next.",
)

_NEXT_TITLE = (
    "The history is {history}. What is the title of the next item?",
    "Someone had {history}, oldest first. Name the next item by its title.",
    "Items so far: {history}\nTitle of the next item:",
    "After {history}, what is the item called that comes next?",
    "Write the title of the item that continues {history}.",
    "A customer went through {history} in this order. Recommend one more item and give only its title.",
    "Read the record {history} and predict how the next entry is titled.",
    "Which title would a person choose who has already had {history}?",
    "I have had {history}. Tell me the title of what I should have next.",
    "What follows {history}? Answer with a title.",
    "Here is what a user picked over time: {history}. Under what title does the next pick stand in the catalogue?",
)

_NEXT_DESCRIPTION = (
    "The history is {history}. Describe the next item.",
    "Someone had {history}, oldest first. What is the item like that comes next?",
    "Items so far: {history}\nDescription of the next item:",
    "After {history}, what kind of item will this person choose? Describe it.",
    "Write the catalogue's description of the item that continues {history}.",
    "A customer went through {history} in this order. Describe one more item to recommend.",
    "Read the record {history} and predict the description of the next entry.",
    "Put into words the item that someone with the history {history} turns to next.",
    "I have had {history}. Describe what I should have next.",
    "What follows {history}? Answer with a description, without a title.",
    "Here is what a user picked over time: {history}. How does the catalogue describe the next pick?",
)

_TITLES_TO_ITEM = (
    "Someone had these items, oldest first:\n{titles}\nWhich item comes next?",
    "Titles in the order of use:\n{titles}\nNext item:",
    "A user's history:\n{titles}\nName the semantic ID of the item that follows.",
    "Continue this list by one item, given as a semantic ID:\n{titles}",
    "I have had the following, the last one just now.\n{titles}\nWhat should I have next?",
    "Which item of the catalogue would you recommend to a person with this history?\n{titles}",
    "Below is what a customer chose over time.\n{titles}\nPredict the next choice.",
    "Read these titles and recommend one more item.\n{titles}",
    "{titles}\nThese were the latest items of one user. Which one is next?",
    "What fits best behind these titles?\n{titles}\nAnswer with a semantic ID.",
    "The record of a user reads:\n{titles}\nFind the item that belongs on the next line.",
)

_TITLE_TO_INDEX = (
    'Which item is called "{title}"?',
    "Title: {title}\nSemantic ID:",
    'Give the semantic ID of "{title}".',
    "Find the item with the title {title}.",
    'The catalogue lists something under the title "{title}". Which item is it?',
    'What is the semantic ID behind the title "{title}"?',
    "Look up {title} in the catalogue.",
    'I know only the title, "{title}". Name the item.',
    "Translate this title into its semantic ID: {title}",
    'An item goes by the name "{title}". Identify it.',
    "{title}\nWhich item is that?",
)

_DESCRIPTION_TO_INDEX = (
    "Which item is described here? {description}",
    "Description: {description}\nSemantic ID:",
    "Give the semantic ID of the item with this description.\n{description}",
    "Find the item that fits the following text: {description}",
    "The catalogue says about one item: {description}\nWhich item is it?",
    "What is the semantic ID behind these words?\n{description}",
    "I forgot the title, but this is what it is about: {description}\nName the item.",
    "Read the text and identify the item.\n{description}",
    "Translate this description into a semantic ID: {description}",
    "{description}\nThis text belongs to an item. Which one?",
    "Match the description to its item: {description}",
)

_TITLE_AND_DESCRIPTION_TO_INDEX = (
    "Title: {title}\nDescription: {description}\nSemantic ID:",
    'Which item is called "{title}" and described like this? {description}',
    'Give the semantic ID of "{title}". The catalogue says about it: {description}',
    "Find the item in the catalogue by its entry.\n{title}\n{description}",
    'An item with the title "{title}" has this description: {description}\nIdentify it.',
    "{title}: {description}\nWhich item is that?",
    'I am looking for "{title}". It is about this: {description}\nName the item.',
    "Translate title and description into a semantic ID.\nTitle: {title}\nDescription: {description}",
    "Here is all the text of one item. Title: {title}. Text: {description}\nWhat is its semantic ID?",
    'The description is "{description}" and the title is "{title}". Which item has both?',
    "Match this entry to its item.\n{title}\n{description}",
)

_INDEX_TO_TITLE = (
    "What is {item} called?",
    "Semantic ID: {item}\nTitle:",
    "Give the title of {item}.",
    "Under which title does the catalogue list {item}?",
    "Name the item {item} in words.",
    "Translate the semantic ID {item} into a title.",
    "Which title belongs to {item}?",
    "I see {item} in a list. What does it stand for? The title is enough.",
    "Look up {item} and tell me its title.",
    "{item} is an item of the catalogue. How is it titled?",
    "Write out the title behind {item}.",
)

_INDEX_TO_DESCRIPTION = (
    "What is {item} like?",
    "Semantic ID: {item}\nDescription:",
    "Describe {item}.",
    "What does the catalogue say about {item}?",
    "Tell me about the item {item}, without its title.",
    "Translate the semantic ID {item} into a description.",
    "Which description belongs to {item}?",
    "I see {item} in a list. What kind of item is it?",
    "Look up {item} and give its description.",
    "{item} is an item of the catalogue. How is it described?",
    "Write out the description behind {item}.",
)

_INDEX_TO_TITLE_AND_DESCRIPTION = (
    "What is {item} called, and what is it like? Title first, description on the next line.",
    "Semantic ID: {item}\nTitle and description, one a line:",
    "Give the title of {item} and, below it, the description.",
    "Write the catalogue's entry for {item}: title, line break, description.",
    "Name {item} on one line and describe it on the next.",
    "Translate the semantic ID {item} into a title and a description on two lines.",
    "Which title and which description belong to {item}? Use a line for each.",
    "I see {item} in a list. Tell me its title, then on a new line what it is like.",
    "Look up {item}. I need both lines of its entry, the title and the description.",
    "{item} is an item of the catalogue. How is it titled, and how does the text below the title go?",
    "All that is written about {item}, please: first a line with the title, then the description.",
)

_SEARCH_PREFERENCE = (
    "Find an item for someone with this taste: {preference}",
    "What the user likes: {preference}\nItem:",
    "A user's preferences are described as follows. {preference}\nWhich item suits?",
    "Recommend one item to this person.\n{preference}",
    "{preference}\nName an item that such a user would choose.",
    "Given the preference below, search the catalogue for one item.\n{preference}",
    "Which item would please somebody of whom this is said? {preference}",
    "About a customer: {preference}\nWhat would you offer?",
    "Here is a portrait of a user: {preference}\nGive the semantic ID of a fitting item.",
    "Choose the item that matches this taste best: {preference}",
)

_SEARCH_QUERY = (
    "{query}",
    "Search: {query}",
    "A user asks: {query}\nItem:",
    "Find the item that this request means. {query}",
    "Request: {query}\nAnswer with one semantic ID.",
    'Somebody says: "{query}" Which item do you give them?',
    "Search the catalogue for one item.\n{query}",
    "Which item answers the following wish? {query}",
    "{query}\nRecommend something from the catalogue.",
    "The search box holds these words: {query}\nWhat is the first result?",
)

_SEARCH_HISTORY_PREFERENCE = (
    "History: {history}\nTaste: {preference}\nItem:",
    "A user had {history}, and this is known of the user: {preference}\nWhich item suits?",
    "Find an item for someone who likes this: {preference}\nThe latest items were {history}.",
    "Recommend one more item after {history}.\nWhat the user prefers: {preference}",
    "Somebody chose {history} over time. In words: {preference}\nWhat is next?",
    "{preference}\nThat describes a person with the history {history}. Name an item to recommend.",
    "From the items {history} and the note below, search the catalogue for the next item.\n{preference}",
    "Items so far: {history}. About the user: {preference}\nGive one semantic ID.",
    "Which item continues {history} and agrees with this taste? {preference}",
    "Take both into account, the record {history} and the preference. {preference}\nWhich item do you offer?",
)

_SEARCH_HISTORY_QUERY = (
    "History: {history}\nRequest: {query}\nItem:",
    "A user had {history} and now asks: {query}\nWhich item is meant?",
    "{query}\nSo far I have had {history}.",
    "Search for a person with the history {history}: {query}",
    "Someone who chose {history} types this into the search box: {query}\nWhat is the best result?",
    "I have had {history}. {query}",
    "Answer this request with one item, and mind that {history} came before it. {query}",
    "Items so far: {history}. Wish: {query}\nGive one semantic ID.",
    "Which item continues {history} and meets the following wish? {query}",
    "Take both into account, the record {history} and the request. {query}\nWhich item do you offer?",
)

_SEARCH_PREFERENCE_QUERY = (
    "Taste: {preference}\nRequest: {query}\nItem:",
    "This is known of a user: {preference}\nThe user asks: {query}\nWhich item is meant?",
    "{query}\nIn case it helps, this is what I like: {preference}",
    "Search for a person with these preferences. {preference}\nSearch words: {query}",
    "About a customer: {preference}\nWhat the customer wants now: {query}\nWhat would you offer?",
    "Find one item that meets the wish and suits the taste.\nWish: {query}\nTaste: {preference}",
    "{preference}\nSuch a user says: {query}\nName the item.",
    "Answer this request with one item: {query}\nThe person behind it is described as follows. {preference}",
    "Which item answers the first line and agrees with the second?\n{query}\n{preference}",
    "Take both into account, what the user prefers and what the user asks for.\n{preference}\n{query}\nGive one item.",
)

_SEARCH_HISTORY_PREFERENCE_QUERY = (
    "History: {history}\nTaste: {preference}\nRequest: {query}\nItem:",
    "A user had {history}. This is known of the user: {preference}\nNow the user asks: {query}\nWhich item is meant?",
    "{query}\nSo far I have had {history}, and this is what I like: {preference}",
    "Search for a person with the history {history}.\nPreferences: {preference}\nSearch words: {query}",
    "Somebody chose {history} over time. In words: {preference}\nThe wish of the day: {query}\nWhat would you offer?",
    "Find one item that follows {history}, suits the taste and meets the wish.\nTaste: {preference}\nWish: {query}",
    "Items so far: {history}. About the user: {preference}\nRequest: {query}\nGive one semantic ID.",
    "Answer this request with one item: {query}\nIt comes from someone with the record {history}. {preference}",
    "{preference}\nThat describes a person who had {history} and says: {query}\nName the item.",
    "You have the record {history}, a note on the user and a request.\n{preference}\n{query}\nWhich item is it?",
)

_PREFERENCE = (
    "What does someone like who had {history}?",
    "Items so far: {history}\nPreference:",
    "Describe the taste of a user with the history {history}.",
    "Read the record {history} and say what the user prefers.",
    "A customer went through {history} in this order. What does that tell about the customer's preferences?",
    "Sum up in words what the choices {history} have in common.",
    "Draw a short portrait of the user behind {history}.",
    "I have had {history}. What do I seem to like?",
    "Here is what a user picked over time: {history}. What kind of thing is this user interested in?",
    "Infer the preferences that explain {history}.",
    "Put the interests of a person who chose {history} into words.",
)

TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "next_item": {"history": _NEXT_ITEM},
    "next_title": {"history": _NEXT_TITLE},
    "next_description": {"history": _NEXT_DESCRIPTION},
    "titles_to_item": {"titles": _TITLES_TO_ITEM},
    "item_to_index": {
        "title": _TITLE_TO_INDEX,
        "description": _DESCRIPTION_TO_INDEX,
        "title+description": _TITLE_AND_DESCRIPTION_TO_INDEX,
    },
    "index_to_item": {
        "title": _INDEX_TO_TITLE,
        "description": _INDEX_TO_DESCRIPTION,
        "title+description": _INDEX_TO_TITLE_AND_DESCRIPTION,
    },
    "item_search": {
        "preference": _SEARCH_PREFERENCE,
        "query": _SEARCH_QUERY,
        "history+preference": _SEARCH_HISTORY_PREFERENCE,
        "history+query": _SEARCH_HISTORY_QUERY,
        "preference+query": _SEARCH_PREFERENCE_QUERY,
        "history+preference+query": _SEARCH_HISTORY_PREFERENCE_QUERY,
    },
    "preference_obtain": {"history": _PREFERENCE},
}
