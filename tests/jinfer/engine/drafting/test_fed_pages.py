"""What a drafter has been fed, page by page, against a model that remembers every place."""

import random
import types

from jinfer.engine.drafting.fed_pages import FedPages
from jinfer.engine.plan import PageMoves

SIZE, NUM_PAGES = 4, 12


def make_request(pages):
    return types.SimpleNamespace(pages=pages)


def test_what_is_said_to_be_fed_is():
    """Random writes by requests that share pages, copies and clearings."""
    rng = random.Random(0)
    num_fed = num_missing = 0
    for _ in range(200):
        fed = FedPages(NUM_PAGES, SIZE)
        places = [False] * (NUM_PAGES * SIZE)  # whether the drafter holds what the model holds
        common = rng.sample(range(NUM_PAGES), 8)
        for _ in range(30):
            pages = common[: rng.randint(0, 3)]
            pages = pages + rng.sample(sorted(set(range(NUM_PAGES)) - set(pages)), 3)
            slots = [page * SIZE + i for page in pages for i in range(SIZE)]
            kind = rng.random()
            if kind < 0.6:
                start = rng.randrange(len(slots))
                count = rng.randint(1, len(slots) - start)
                is_fed = rng.random() < 0.6
                fed.note(pages, start, count, is_fed=is_fed)
                for slot in slots[start : start + count]:
                    places[slot] = is_fed
            elif kind < 0.7:
                source, page = rng.sample(range(NUM_PAGES), 2)
                count = rng.randint(1, SIZE)
                fed.note_moves(PageMoves(copied=((source, page, count),)))
                copied = places[source * SIZE : source * SIZE + count]
                places[page * SIZE : (page + 1) * SIZE] = copied + [False] * (SIZE - count)
            elif kind < 0.75:
                fed.note_moves(PageMoves(cleared=(pages[0],)))
                places[pages[0] * SIZE : (pages[0] + 1) * SIZE] = [False] * SIZE
            else:
                num_tokens = rng.randint(1, len(slots))
                first = fed.first_missing(pages, num_tokens)
                assert all(places[slot] for slot in slots[:first])
                num_fed += first
                batches = fed.take_missing([(make_request(pages), num_tokens)], 5, 2)
                pieces = [piece for batch in batches for piece in batch]
                assert all(sum(n for _, _, n in batch) <= 5 for batch in batches)
                for _, start, count in pieces:
                    assert start == first
                    first += count
                    num_missing += count
                    for slot in slots[start : start + count]:
                        places[slot] = True
                assert first == num_tokens
                assert fed.first_missing(pages, num_tokens) == num_tokens
    assert num_fed > 1000 and num_missing > 1000


def test_batches_hold_so_many_tokens_and_sequences():
    requests = [make_request([i]) for i in range(5)]
    batches = FedPages(NUM_PAGES, SIZE).take_missing([(r, 3) for r in requests], 7, 2)
    counts = [[(requests.index(r), start, n) for r, start, n in batch] for batch in batches]
    assert counts == [[(0, 0, 3), (1, 0, 3)], [(2, 0, 3), (3, 0, 3)], [(4, 0, 3)]]
    batches = FedPages(NUM_PAGES, SIZE).take_missing([(r, 3) for r in requests], 7, 5)
    counts = [[(requests.index(r), start, n) for r, start, n in batch] for batch in batches]
    assert counts == [
        [(0, 0, 3), (1, 0, 3), (2, 0, 1)],
        [(2, 1, 2), (3, 0, 3), (4, 0, 2)],
        [(4, 2, 1)],
    ]
