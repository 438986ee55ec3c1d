-- Shopify: one row per order line, and one row for the refunds of an order.
--
-- Export: Admin > Orders > Export > Export orders, as plain CSV. Part files and exports that overlap can be in one
-- folder. Shopify fills the order fields only on the first line of an order, which can be in the part file before.
-- Of several exports of an order, one that is not pending wins, then the largest refund, then the last file.
--
-- Discounts  An amount is what the customer pays for the line. The amounts of an order add up to its Subtotal, which is
--            shared by the value of the lines and rounded on the running total. Lines of 0.00 have no row.
-- Shipping   Not included.
-- Taxes      As in the Subtotal: included where prices include taxes, otherwise not.
-- Refunds    A refunded order stays completed, as in Shopify's sales reports. The refund is a row of its own with a
--            negative amount, `#1001/refund`. Full refunds and cancelled paid orders return the Subtotal. Partial refunds
--            return the Refunded Amount without the taxes on top of prices, at most the Subtotal. The export does not
--            name the refunded lines, the time or the share of shipping: the product is null, and the time is that of
--            the cancellation, if any, otherwise that of the order.
-- Status     paid, partially_paid, partially_refunded, refunded: completed. pending, authorized, expired: pending, or
--            cancelled if the order was cancelled. voided: cancelled.
--
-- source orders: orders*, shopify_orders*
-- columns orders: Name, Email, Financial Status, Currency, Subtotal, Shipping, Taxes, Total, Created at
-- columns orders: Lineitem quantity, Lineitem name, Lineitem price, Lineitem sku, Lineitem discount, Cancelled at
-- columns orders: Billing Name, Billing City, Shipping City, Payment Method, Refunded Amount, Vendor

WITH records AS (
    SELECT *,
        coalesce(trim(Name), '') AS order_id,
        CASE WHEN `Financial Status` <> '' THEN _delivery END AS begins_in
    FROM orders
),
-- `copy` is the file in which a copy of the order begins. Continued lines belong to the last copy that has begun, or to
-- the first one if its file has a later name (`orders_10.csv` sorts before `orders_9.csv`).
copies AS (
    SELECT *,
        coalesce(
            LAST_VALUE(begins_in) IGNORE NULLS
                OVER (PARTITION BY order_id ORDER BY _delivery, _source_row ROWS UNBOUNDED PRECEDING),
            MIN(begins_in) OVER (PARTITION BY order_id),
            _delivery
        ) AS copy
    FROM records
),
lines AS (
    SELECT
        order_id, copy,
        ROW_NUMBER() OVER (PARTITION BY order_id, copy ORDER BY _delivery <> copy, _delivery, _source_row) AS position,
        coalesce(nullif(regexp_replace(trim(`Lineitem sku`), "^'", ''), ''), trim(`Lineitem name`)) AS product_id,
        `Lineitem quantity` AS quantity,
        concat_ws(' - ', `Lineitem price`, `Lineitem discount`) AS price_text,
        CAST(
            try_cast(`Lineitem quantity` AS INT) * try_cast(`Lineitem price` AS DECIMAL(12, 2))
            - CASE WHEN trim(`Lineitem discount`) <> '' THEN try_cast(`Lineitem discount` AS DECIMAL(12, 2)) ELSE 0 END
            AS DECIMAL(14, 2)
        ) AS value,
        _delivery, _source_file, _source_row
    FROM copies
),
-- MAX finds the order fields: the other lines of the copy have none, or the same.
order_copies AS (
    SELECT
        order_id, copy,
        MAX(lower(trim(Email))) AS email,
        MAX(lower(trim(`Financial Status`))) AS financial_status,
        MAX(`Created at`) AS created_at,
        nullif(MAX(trim(`Cancelled at`)), '') AS cancelled_at,
        nullif(MAX(trim(Currency)), '') AS currency,
        nullif(MAX(trim(`Payment Method`)), '') AS payment_method,
        coalesce(nullif(MAX(trim(`Shipping City`)), ''), nullif(MAX(trim(`Billing City`)), '')) AS location,
        MAX(Subtotal) AS subtotal_text,
        try_cast(MAX(Subtotal) AS DECIMAL(12, 2)) AS subtotal,
        coalesce(try_cast(MAX(Shipping) AS DECIMAL(12, 2)), 0) AS shipping,
        coalesce(try_cast(MAX(Taxes) AS DECIMAL(12, 2)), 0) AS taxes,
        try_cast(MAX(Total) AS DECIMAL(12, 2)) AS total,
        nullif(MAX(trim(`Refunded Amount`)), '') AS refunded_text,
        SUM(try_cast(`Lineitem quantity` AS INT)) AS pieces
    FROM copies
    GROUP BY order_id, copy
),
statuses AS (
    SELECT *,
        CASE WHEN refunded_text IS NULL THEN 0 ELSE try_cast(refunded_text AS DECIMAL(12, 2)) END AS refunded,
        financial_status = 'refunded' OR cancelled_at IS NOT NULL AS is_returned,
        CASE WHEN total - subtotal - shipping >= taxes THEN taxes ELSE 0 END AS taxes_on_top,
        CASE
            WHEN financial_status IN ('paid', 'partially_paid', 'partially_refunded', 'refunded') THEN 'completed'
            WHEN financial_status = 'voided' THEN 'cancelled'
            WHEN financial_status IN ('pending', 'authorized', 'expired')
                THEN CASE WHEN cancelled_at IS NULL THEN 'pending' ELSE 'cancelled' END
            ELSE financial_status
        END AS status
    FROM order_copies
),
latest AS (
    SELECT *, CASE WHEN email <> '' THEN xxhash64(email) END AS customer_id
    FROM (
        SELECT *,
            ROW_NUMBER() OVER (PARTITION BY order_id ORDER BY status = 'pending', refunded DESC, copy DESC) AS recency
        FROM statuses
    ) WHERE recency = 1
),
running AS (
    SELECT
        l.*, o.customer_id, o.currency, o.created_at, o.payment_method, o.status, o.location, o.subtotal,
        o.subtotal_text,
        CAST(SUM(l.value) OVER (PARTITION BY l.order_id ORDER BY l.position ROWS UNBOUNDED PRECEDING)
            AS DECIMAL(14, 2)) AS value_up_to,
        CAST(SUM(l.value) OVER (PARTITION BY l.order_id) AS DECIMAL(14, 2)) AS total_value
    FROM lines l
    JOIN latest o ON o.order_id = l.order_id AND o.copy = l.copy
),
-- Where no line has a value, the first one takes the Subtotal.
shares AS (
    SELECT *,
        CASE WHEN total_value <> 0
            THEN round(CAST(subtotal * coalesce(value_up_to, 0) AS DECIMAL(28, 4)) / total_value, 2)
            ELSE subtotal
        END AS paid_up_to
    FROM running
),
amounts AS (
    SELECT *,
        CAST(paid_up_to - coalesce(LAG(paid_up_to) OVER (PARTITION BY order_id ORDER BY position), 0)
            AS DECIMAL(12, 2)) AS amount
    FROM shares
),
refunds AS (
    SELECT *,
        CAST(CASE
            WHEN is_returned THEN subtotal
            WHEN refunded > 0 AND subtotal > 0 THEN least(
                subtotal, round(CAST(refunded * subtotal AS DECIMAL(28, 4)) / (subtotal + taxes_on_top), 2)
            )
        END AS DECIMAL(12, 2)) AS amount
    FROM latest
    WHERE status = 'completed'
)
SELECT
    concat(nullif(order_id, ''), '/', position) AS transaction_id,
    order_id, customer_id, product_id, quantity,
    -- A text that is no number is handed on, so that the row is rejected with it.
    CASE WHEN value IS NULL THEN price_text WHEN subtotal IS NULL THEN subtotal_text ELSE CAST(amount AS STRING) END
        AS amount,
    currency, created_at AS timestamp, payment_method, status, location,
    _delivery, _source_file, _source_row
FROM amounts
WHERE value IS NULL OR subtotal IS NULL OR amount <> 0
UNION ALL
SELECT
    concat(order_id, '/refund') AS transaction_id,
    order_id, customer_id, CAST(NULL AS STRING) AS product_id,
    CAST(CASE WHEN is_returned THEN 0 - pieces ELSE -1 END AS STRING) AS quantity,
    CASE WHEN amount IS NULL THEN refunded_text ELSE CAST(0 - amount AS STRING) END AS amount,
    currency, coalesce(cancelled_at, created_at) AS timestamp, payment_method, 'returned' AS status, location,
    copy AS _delivery, CAST(NULL AS STRING) AS _source_file, CAST(NULL AS BIGINT) AS _source_row
FROM refunds
WHERE amount > 0 OR refunded IS NULL
