"""What one would write in an afternoon: FastAPI, pydantic models, SQLAlchemy's session.

The baseline of the ingest benchmark, no part of the product. It stores the fields of a quote, in types that the quotes
of the benchmark fit into, in a plain table of a schema of its own with the key and the index that come to mind. It
checks the types, and nothing else: no times, no duplicates, no newest quote of a symbol.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from decimal import Decimal

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy import BigInteger, Index, Numeric, Text, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateSchema


class Base(DeclarativeBase):
    """Declarative base."""


class Quote(Base):
    """A stored quote."""

    __tablename__ = "quotes"
    __table_args__ = (Index("idx_timestamp_desc", text("timestamp DESC")), {"schema": "afternoon"})

    symbol: Mapped[str] = mapped_column(Text(collation="C"), primary_key=True)
    timestamp: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True), primary_key=True)
    price: Mapped[Decimal] = mapped_column(Numeric(20, 8))
    bid: Mapped[Decimal | None] = mapped_column(Numeric(20, 8))
    ask: Mapped[Decimal | None] = mapped_column(Numeric(20, 8))
    bid_size: Mapped[int | None] = mapped_column(BigInteger)
    ask_size: Mapped[int | None] = mapped_column(BigInteger)
    volume: Mapped[int | None] = mapped_column(BigInteger)
    source: Mapped[str | None] = mapped_column(Text)


class QuoteIn(BaseModel):
    """A quote of a request."""

    symbol: str
    timestamp: datetime
    price: Decimal
    bid: Decimal | None = None
    ask: Decimal | None = None
    bid_size: int | None = None
    ask_size: int | None = None
    volume: int | None = None
    source: str | None = None


class Quotes(BaseModel):
    """A request."""

    quotes: list[QuoteIn]


def create() -> FastAPI:
    """The application, on the database of QUOTES_DATABASE_URL."""
    url = os.environ["QUOTES_DATABASE_URL"].replace("postgresql://", "postgresql+asyncpg://", 1)
    engine = create_async_engine(url, pool_size=10, max_overflow=20)
    session_of = async_sessionmaker(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.begin() as connection:
            await connection.execute(CreateSchema("afternoon", if_not_exists=True))
            await connection.run_sync(Base.metadata.create_all)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.post("/quotes")
    async def ingest(body: Quotes) -> dict[str, int]:
        async with session_of() as session:
            session.add_all([Quote(**quote.model_dump()) for quote in body.quotes])
            await session.commit()
        return {"inserted": len(body.quotes)}

    return app
