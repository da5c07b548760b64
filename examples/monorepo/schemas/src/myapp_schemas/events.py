"""Events: what has happened, for whoever wants to know."""

from uuid import UUID

from pydantic import BaseModel, EmailStr

from conductor import define_event


class UserCreated(BaseModel):
    """Somebody has signed up."""

    user_id: UUID
    email: EmailStr


user_created = define_event("user.created", payload=UserCreated)
