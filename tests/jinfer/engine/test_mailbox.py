"""Items get from one thread to another, whatever their order of events."""

import asyncio
import sys
import threading

import pytest

from jinfer.engine.mailbox import Mailbox, wake

TIMEOUT_S = 15


@pytest.fixture
def quick_switches():
    """Has Python change threads every few bytecodes."""
    seconds = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(seconds)


def test_items_come_in_their_order_and_stay_until_they_are_taken():
    mailbox = Mailbox()
    assert mailbox.first() is None and mailbox.take() is None
    for item in "ab":
        mailbox.put(item)
    mailbox.wait()
    assert mailbox.first() == mailbox.first() == "a"
    assert [mailbox.take() for _ in range(3)] == ["a", "b", None]


def test_a_waiter_that_leaves_while_the_writer_takes_it_is_no_error():
    """The reader finds an item at the moment when the writer has seen that a reader waits."""
    mailbox = Mailbox()

    class Waiters(type(mailbox._waiters)):
        def __len__(self):  # how the writer may ask; then the reader leaves
            count = super().__len__()
            self.clear()
            return count

    mailbox._waiters = Waiters([threading.Lock()])
    assert len(mailbox.take_waiters()) <= 1


@pytest.mark.parametrize("reader", ["thread", "asyncio"])
def test_no_item_and_no_reader_is_lost_when_both_are_quick(quick_switches, reader):
    there, back, count, found = Mailbox(), Mailbox(), 3000, []

    def write():
        for i in range(count):
            there.put(i)
            wake([there])
            if i % 3 == 0:  # now and then in step with the reader, else far ahead
                back.wait()
                back.take()

    def take():
        while (item := there.take()) is not None:
            found.append(item)
            if item % 3 == 0:
                back.put(item)
                wake([back])

    async def read_async():
        while len(found) < count:
            await there.wait_async()
            take()

    def read():
        while len(found) < count:
            there.wait()
            take()

    readers = {"thread": read, "asyncio": lambda: asyncio.run(read_async())}
    threads = [threading.Thread(target=run, daemon=True) for run in (write, readers[reader])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert found == list(range(count))


def test_a_cancelled_wait_leaves_nothing_behind():
    mailbox = Mailbox()

    async def wait_in_vain():
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(mailbox.wait_async(), 1e-3)

    asyncio.run(wait_in_vain())
    assert mailbox.take_waiters() == []


def test_a_reader_of_a_closed_event_loop_does_not_keep_the_others_asleep():
    mailboxes = [Mailbox(), Mailbox()]

    async def leave():
        task = asyncio.ensure_future(mailboxes[0].wait_async())
        await asyncio.sleep(0)
        return task

    event_loop = asyncio.new_event_loop()
    task = event_loop.run_until_complete(leave())
    thread = threading.Thread(target=mailboxes[1].wait, daemon=True)
    thread.start()
    task.cancel()
    event_loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    event_loop.close()
    for mailbox in mailboxes:
        mailbox.put(1)
    wake(mailboxes)
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
