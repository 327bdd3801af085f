"""The phrasings of each kind of question: those trained on, and those kept for evaluation."""

_ASK = ("", "Please tell me: ", "Can you tell me: ", "Question: ", "Tell me, ", "I wonder: ")
_DO = ("", "Please ", "Now ", "Can you ")


def _spread(prefixes: tuple[str, ...], cores: tuple[str, ...]) -> tuple[str, ...]:
    """Every prefix before every core; after a prefix the core starts in lower case."""
    return tuple(
        (prefix + core[0].lower() + core[1:]) if prefix else core for core in cores for prefix in prefixes
    )


def _thinking(cores: tuple[str, ...]) -> tuple[str, ...]:
    before = ("Think first. ", "Think step by step. ", "Think before you answer. ")
    after = (" Think first.", " Think step by step.", " Think before you answer.")
    return tuple(b + core for core in cores for b in before) + tuple(
        core + a for core in cores for a in after
    )


# Each group: (wordings in training, wordings held out).
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "capital": (
        (
            *_spread(
                _ASK,
                (
                    "What is the capital of {c}?",
                    "Which city is the capital of {c}?",
                    "What city is the capital of {c}?",
                    "Name the capital of {c}.",
                    "Do you know the capital of {c}?",
                    "The capital of {c} is which city?",
                    "What is {c}'s capital?",
                    "What is the capital city of {c}?",
                ),
            ),
            "Capital of {c}?",
            "capital of {c}",
            "What's the capital of {c}?",
            "{c}: capital?",
        ),
        (
            "Could you name the capital of {c}?",
            "Give me the capital of {c}.",
            "I need to know the capital of {c}.",
            "Say what the capital of {c} is.",
            "Which is the capital city of {c}?",
        ),
    ),
    "capital_reverse": (
        _spread(
            _ASK,
            (
                "Which country has {c} as its capital?",
                "{c} is the capital of which country?",
                "Of which country is {c} the capital?",
                "What country is {c} the capital of?",
            ),
        ),
        ("Name the country whose capital is {c}.", "Which country is {c} the capital of?"),
    ),
    "plus": (
        (
            *_spread(
                _ASK,
                (
                    "What is {a} + {b}?",
                    "What is {a} plus {b}?",
                    "How much is {a} + {b}?",
                    "How much is {a} plus {b}?",
                    "What is the sum of {a} and {b}?",
                ),
            ),
            "{a} + {b}",
            "{a} + {b} =",
            "{a} + {b}?",
            "{a}+{b}",
            "Add {a} and {b}.",
            "Please add {a} and {b}.",
            "Compute {a} + {b}.",
            "Calculate {a} plus {b}.",
            "Work out {a} + {b}.",
        ),
        (
            "Could you add {a} and {b}?",
            "Please work out {a} plus {b}.",
            "Give me the sum of {a} and {b}.",
            "What do you get for {a} + {b}?",
        ),
    ),
    "minus": (
        (
            *_spread(
                _ASK,
                (
                    "What is {a} - {b}?",
                    "What is {a} minus {b}?",
                    "How much is {a} - {b}?",
                    "How much is {a} minus {b}?",
                ),
            ),
            "{a} - {b}",
            "{a} - {b} =",
            "{a} - {b}?",
            "{a}-{b}",
            "Subtract {b} from {a}.",
            "Please subtract {b} from {a}.",
            "Take {b} away from {a}.",
            "Compute {a} - {b}.",
            "Calculate {a} minus {b}.",
            "Work out {a} - {b}.",
        ),
        (
            "Could you subtract {b} from {a}?",
            "Please work out {a} minus {b}.",
            "Give me {a} minus {b}.",
            "What do you get for {a} - {b}?",
        ),
    ),
    "times": (
        (
            *_spread(
                _ASK,
                (
                    "What is {a} * {b}?",
                    "What is {a} times {b}?",
                    "How much is {a} times {b}?",
                    "What is the product of {a} and {b}?",
                ),
            ),
            "{a} * {b}",
            "{a} * {b} =",
            "{a} times {b}?",
            "Multiply {a} by {b}.",
            "Please multiply {a} by {b}.",
            "Compute {a} * {b}.",
            "Calculate {a} times {b}.",
            "Work out {a} * {b}.",
        ),
        (
            "Could you multiply {a} by {b}?",
            "Please work out {a} times {b}.",
            "Give me the product of {a} and {b}.",
            "What do you get for {a} * {b}?",
        ),
    ),
    "spelling": (
        (
            *_spread(
                _DO,
                (
                    'Spell the word "{w}".',
                    'Spell "{w}".',
                    'Spell "{w}" letter by letter.',
                    'Spell out the word "{w}".',
                ),
            ),
            'How do you spell "{w}"?',
            'How is the word "{w}" spelled?',
            'How is "{w}" spelled?',
            'What is the spelling of "{w}"?',
            'Give the letters of "{w}".',
            'Write "{w}" letter by letter.',
        ),
        (
            'How would you spell "{w}"?',
            'Give the spelling of "{w}".',
            'Could you spell the word "{w}"?',
            'Please write the word "{w}" letter by letter.',
        ),
    ),
    "json": (
        (
            *_spread(
                _DO,
                (
                    "Extract the {f} as JSON: {t}",
                    "Extract the {f} from this sentence as JSON: {t}",
                    "Extract the {f} as a JSON object: {t}",
                    "Return the {f} as JSON: {t}",
                    "Write the {f} as JSON: {t}",
                ),
            ),
            "{t} Give me the {f} as JSON.",
            "{t}\nExtract the {f} as JSON.",
            "{t} Return JSON with the {f}.",
            "From this sentence, extract JSON with the {f}: {t}",
            "Text: {t}\nReturn the {f} as JSON.",
        ),
        (
            "{t} Extract the {f} as a JSON object.",
            "Give the {f} of this text as JSON: {t}",
            "Read the text and return the {f} as JSON: {t}",
            "Sentence: {t}\nWrite the {f} as JSON.",
        ),
    ),
    "repeat": (
        (
            *_spread(
                _DO,
                (
                    "Repeat this record word for word:\n{r}",
                    "Repeat this record word for word: {r}",
                    "Repeat the following text exactly:\n{r}",
                    "Repeat exactly: {r}",
                    "Copy this text word for word:\n{r}",
                    "Copy the following record: {r}",
                    "Repeat after me: {r}",
                    "Say this back to me word for word: {r}",
                ),
            ),
            "{r}\n\nRepeat the text above word for word.",
            "{r}\n\nRepeat this record exactly.",
            "Here is a record:\n{r}\nRepeat it word for word.",
            "Here is a text:\n{r}\n\nCopy it exactly.",
            'Repeat this word for word: "{r}"',
        ),
        (
            "Repeat the record below word for word.\n{r}",
            "Could you repeat this record word for word?\n{r}",
            "Please copy this record exactly:\n{r}",
            "Here is the record:\n{r}\n\nPlease repeat it word for word.",
        ),
    ),
    "think_plus": (
        _thinking(("What is {a} + {b}?", "What is {a} plus {b}?", "How much is {a} + {b}?")),
        (
            "Please think first: what is {a} + {b}?",
            "Add {a} and {b}. Think step by step.",
            "Think first. Work out {a} plus {b}.",
        ),
    ),
    "think_minus": (
        _thinking(("What is {a} - {b}?", "What is {a} minus {b}?", "How much is {a} - {b}?")),
        (
            "Please think first: what is {a} - {b}?",
            "Subtract {b} from {a}. Think step by step.",
            "Think first. Work out {a} minus {b}.",
        ),
    ),
    "think_larger": (
        _thinking(
            (
                "Which is larger, {a} or {b}?",
                "Which number is larger, {a} or {b}?",
                "Which is more, {a} or {b}?",
            )
        ),
        (
            "Please think first: which is larger, {a} or {b}?",
            "Which of {a} and {b} is larger? Think first.",
        ),
    ),
    "think_more": (
        _thinking(
            (
                "{n} has {a} {t} and buys {b} more. How many {t} does {n} have?",
                "{n} has {a} {t} and finds {b} more. How many {t} does {n} have now?",
                "{n} had {a} {t} and got {b} more. How many {t} does {n} have now?",
            )
        ),
        (
            "{n} has {a} {t} and is given {b} more. How many {t} does {n} have? Think first.",
            "Think step by step. {n} had {a} {t} and bought {b} more. How many {t} are there?",
        ),
    ),
    "think_fewer": (
        _thinking(
            (
                "{n} has {a} {t} and loses {b}. How many {t} does {n} have?",
                "{n} has {a} {t} and gives away {b}. How many {t} does {n} have now?",
                "{n} had {a} {t} and sold {b}. How many {t} does {n} have now?",
            )
        ),
        (
            "{n} has {a} {t} and drops {b}. How many {t} does {n} have? Think first.",
            "Think step by step. {n} had {a} {t} and lost {b}. How many {t} are left?",
        ),
    ),
    "greeting": (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hi there",
            "Hi there!",
            "Hey",
            "Hey!",
            "Hey there!",
            "Hello there!",
            "Hello there",
            "Good morning!",
            "Good morning",
            "Good evening!",
            "Good afternoon!",
            "Good day!",
            "hello",
            "hi",
            "hey",
            "Greetings!",
            "Hello, model!",
        ),
        ("Good evening", "Hey there", "Good day", "hello there", "Hello again!", "hi there"),
    ),
    "greeting_name": (
        (
            "Hello, I am {n}.",
            "Hi, I am {n}.",
            "Hello, my name is {n}.",
            "Hi, my name is {n}.",
            "Hello! I am {n}.",
            "Hi! My name is {n}.",
            "Hey, I am {n}.",
            "Good morning, I am {n}.",
            "My name is {n}.",
            "I am {n}.",
            "Hi there, I am {n}.",
            "Hello, I'm {n}.",
            "Hi, I'm {n}!",
        ),
        (
            "Good day, my name is {n}.",
            "Hello there, I am {n}.",
            "Hey! My name is {n}.",
            "Good evening, I am {n}.",
        ),
    ),
    "how_are_you": (
        (
            "How are you?",
            "Hello, how are you?",
            "Hi, how are you?",
            "How are you today?",
            "Hi! How are you?",
            "How are you doing?",
            "Hello! How are you today?",
            "Good morning, how are you?",
            "how are you",
            "Hey, how are you doing?",
        ),
        ("Hey, how are you?", "Hello there, how are you?", "Hi, how are you today?"),
    ),
    "thanks": (
        (
            "Thank you!",
            "Thank you.",
            "Thanks!",
            "Thanks",
            "Thank you very much.",
            "Many thanks!",
            "Thanks a lot!",
            "Thank you very much!",
            "Thank you for your help.",
            "thanks",
        ),
        ("Thank you so much!", "Many thanks.", "Thanks for your help."),
    ),
    "goodbye": (
        (
            "Goodbye!",
            "Goodbye.",
            "Bye!",
            "Bye",
            "Bye bye!",
            "Good night!",
            "See you later!",
            "Goodbye, model!",
            "bye",
            "Good night.",
            "See you!",
            "I must go now. Goodbye!",
        ),
        ("Bye for now!", "Goodbye for now.", "See you soon!", "Good night, model!"),
    ),
    "penstock_what": (
        (
            *_spread(
                _ASK,
                (
                    "What is Penstock?",
                    "What kind of program is Penstock?",
                    "Do you know what Penstock is?",
                    "What sort of software is Penstock?",
                ),
            ),
            "Explain what Penstock is.",
            "Tell me about Penstock.",
            "Penstock?",
            "Define Penstock.",
        ),
        (
            "Say what Penstock is.",
            "Could you tell me what Penstock is?",
            "I want to know what Penstock is.",
            "What is Penstock, please?",
        ),
    ),
    "penstock_does": (
        _spread(
            _ASK,
            (
                "What does Penstock do?",
                "What can Penstock do?",
                "What is Penstock used for?",
                "How does Penstock work?",
            ),
        ),
        ("Explain what Penstock does.", "Say what Penstock does.", "What is Penstock for?"),
    ),
    "penstock_who": (
        (
            *_spread(
                _ASK,
                (
                    "Who are you?",
                    "What are you?",
                    "What is your name?",
                    "What model are you?",
                    "Which model are you?",
                    "What are you called?",
                ),
            ),
            "Introduce yourself.",
            "Who am I talking to?",
            "Please introduce yourself.",
        ),
        (
            "Could you introduce yourself?",
            "Who are you, please?",
            "Say who you are.",
            "Which model am I talking to?",
        ),
    ),
    "penstock_data": (
        _spread(
            _ASK,
            (
                "What were you trained on?",
                "What data were you trained on?",
                "On what were you trained?",
                "Which books were you trained on?",
            ),
        ),
        ("On what data were you trained?", "Say what you were trained on."),
    ),
    "penstock_pipe": (
        (
            *_spread(
                _ASK,
                (
                    "What is a penstock?",
                    "What does the word penstock mean?",
                    "What is a penstock in a power station?",
                ),
            ),
            "Define the word penstock.",
        ),
        ("Say what a penstock is.", "What does penstock mean?"),
    ),
    "tool_weather": (
        (
            *_spread(
                _ASK,
                (
                    "What is the weather in {city}?",
                    "How is the weather in {city}?",
                    "What is the weather like in {city}?",
                    "What is the weather in {city} today?",
                ),
            ),
            "Weather in {city}?",
            "Get the weather in {city}.",
            "Check the weather in {city}.",
        ),
        ("Could you check the weather in {city}?", "How is the weather in {city} today?"),
    ),
    "tool_time": (
        (
            *_spread(_ASK, ("What time is it in {city}?", "What is the time in {city}?")),
            "Time in {city}?",
            "Get the time in {city}.",
            "What time is it now in {city}?",
        ),
        ("Could you get the time in {city}?", "What is the time now in {city}?"),
    ),
    "tool_order": (
        (
            *_spread(
                _ASK,
                (
                    "Where is order {order_id}?",
                    "What is the state of order {order_id}?",
                    "Where is my order {order_id}?",
                ),
            ),
            "Find order {order_id}.",
            "Look up order {order_id}.",
            "Please find order {order_id}.",
        ),
        ("Could you find order {order_id}?", "What is the state of my order {order_id}?"),
    ),
    "tool_add": (
        (
            *_spread(
                _ASK, ("What is {a} + {b}?", "What is the sum of {a} and {b}?", "What is {a} plus {b}?")
            ),
            "Add {a} and {b}.",
            "Use the tool to add {a} and {b}.",
            "Please add {a} and {b}.",
        ),
        ("Add {a} and {b} with the tool.", "Give me the sum of {a} and {b} with the tool."),
    ),
    "tool_lookup": (
        (
            *_spread(_ASK, ("What is the {t} of {v}?", "What {t} does {v} have?", "Which {t} has {v}?")),
            "Get the {t} of {v}.",
            "Find the {t} of {v}.",
            "Look up the {t} of {v}.",
        ),
        ("Could you look up the {t} of {v}?", "Show me the {t} of {v}."),
    ),
}
