import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate import NodeStateFactory

from fedseg.site.supernode import push_every_answer


@pytest.fixture
def node():
    """A SuperNode's state and objects."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    objects = ObjectStoreFactory()
    return NodeStateFactory(objects).state(), objects.store()


def instruction(number):
    message = Message(RecordDict({"round": ConfigRecord({"number": number})}), 7, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def answer(state, objects, question):
    message = Message(RecordDict({"answer": ConfigRecord({"to": question.metadata.message_id})}), reply_to=question)
    message.metadata.__dict__["_message_id"] = message.object_id
    objects.preregister(1, get_object_tree(message))
    state.store_message(message)


def test_an_answer_that_was_left_over_does_not_hold_back_the_next_one(node):
    state, objects = node
    old, new = instruction(1), instruction(2)
    answer(state, objects, old)  # of a run that has ended
    state.store_message(new)
    sent = []

    def send(message, tree, seconds):
        sent.append(message.metadata.reply_to_message_id)
        return set(), "session"

    def work():
        time.sleep(0.3)
        answer(state, objects, new)

    worker = threading.Thread(target=work)
    worker.start()
    push_every_answer(state, objects, send, lambda *_: None)
    worker.join()
    assert sent == [old.metadata.message_id, new.metadata.message_id]
    assert not state.msg_store


def test_nothing_is_waited_for_when_every_message_has_its_answer(node):
    state, objects = node
    push_every_answer(state, objects, lambda *_: (set(), "session"), lambda *_: None)


def test_a_message_that_nobody_will_answer_does_not_hold_back_the_next_one(node):
    state, objects = node
    dead, new = instruction(1), instruction(2)
    state.store_message(dead)  # its run ended while it was being fetched
    state.store_message(new)
    answer(state, objects, new)
    sent = []

    def send(message, tree, seconds):
        sent.append(message.metadata.reply_to_message_id)
        return set(), "session"

    push_every_answer(state, objects, send, lambda *_: None)
    assert sent == [new.metadata.message_id]
    assert not state.msg_store
