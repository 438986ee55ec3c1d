-- Stripe: one row per payment, and one row for its refunds.
--
-- Export: Dashboard > Payments > Export, with all columns (unified_payments.csv), or the older payments.csv. Amounts need
-- a decimal point. A payment of several exports is taken from the last one. One that was never tried has no id: its key
-- is the `PaymentIntent ID`.
--
-- Amount     What the customer pays, in the currency of the Stripe balance where exported (`Converted Amount`),
--            otherwise in that of the payment (`Amount`). Stripe's fees are not deducted.
-- Discounts, shipping, taxes   A payment does not name them: discounts are deducted, the others are included.
-- Refunds    A refunded payment stays completed. The refunded amount is a row of its own with a negative amount,
--            `ch_…/refund`, at the time of the refund where exported. Disputes are not refunds, and change nothing.
-- Status     Paid, Refunded: completed. If not captured: pending when Paid, cancelled when Refunded (released).
--            Failed, canceled, blocked: cancelled. All that begin with requires_, and pending, processing, uncaptured,
--            incomplete: pending.
-- Customer   The hash of the e-mail address: of the `Customer ID`, if it has one in any payment, otherwise of the payment.
--            Without any address, the hash of the `Customer ID`. So one person with two ids is one customer.
-- Method     The card's brand, or the type of the payment's source.
--
-- source payments: unified_payments*, payments*, stripe*
-- columns payments: id, Created date (UTC), Created (UTC), Amount, Amount Refunded, Currency, Captured, Converted Amount
-- columns payments: Converted Amount Refunded, Converted Currency, Refunded date (UTC), Status, Card Brand
-- columns payments: PaymentIntent ID, Payment Source Type, Customer ID, Customer Email, Card Name, Card Address City

WITH records AS (
    SELECT
        coalesce(nullif(trim(id), ''), nullif(trim(`PaymentIntent ID`), '')) AS id,
        coalesce(
            MAX(CASE WHEN trim(`Customer ID`) <> '' THEN nullif(lower(trim(`Customer Email`)), '') END)
                OVER (PARTITION BY trim(`Customer ID`)),
            nullif(lower(trim(`Customer Email`)), ''),
            nullif(lower(trim(`Customer ID`)), '')
        ) AS customer,
        CASE WHEN `Converted Amount` <> '' THEN `Converted Amount` ELSE Amount END AS amount,
        CASE WHEN `Converted Amount` <> '' THEN `Converted Amount Refunded` ELSE `Amount Refunded` END AS refunded,
        upper(trim(CASE WHEN `Converted Amount` <> '' THEN `Converted Currency` ELSE Currency END)) AS currency,
        coalesce(`Created date (UTC)`, `Created (UTC)`) AS created,
        coalesce(nullif(`Refunded date (UTC)`, ''), `Created date (UTC)`, `Created (UTC)`) AS refunded_at,
        coalesce(nullif(trim(`Card Brand`), ''), nullif(trim(`Payment Source Type`), '')) AS payment_method,
        lower(trim(Status)) AS stripe_status,
        lower(trim(Captured)) AS captured,
        _delivery, _source_file, _source_row
    FROM payments
),
statuses AS (
    SELECT *,
        CASE
            WHEN stripe_status = 'paid' AND captured = 'false' THEN 'pending'
            WHEN stripe_status = 'refunded' AND captured = 'false' THEN 'cancelled'
            WHEN stripe_status IN ('paid', 'refunded') THEN 'completed'
            WHEN stripe_status IN ('failed', 'canceled', 'blocked') THEN 'cancelled'
            WHEN stripe_status LIKE 'requires%' THEN 'pending'
            WHEN stripe_status IN ('pending', 'processing', 'uncaptured', 'incomplete') THEN 'pending'
            ELSE stripe_status
        END AS status
    FROM records
)
SELECT
    id AS transaction_id,
    CASE WHEN customer IS NOT NULL THEN xxhash64(customer) END AS customer_id,
    'payment' AS product_id,
    '1' AS quantity,
    amount,
    currency,
    -- The older export has no seconds.
    CASE WHEN created LIKE '____-__-__ __:__' THEN concat(created, ':00') ELSE created END AS timestamp,
    payment_method, status,
    _delivery, _source_file, _source_row
FROM statuses
WHERE coalesce(try_cast(amount AS DECIMAL(12, 2)), 1) <> 0
UNION ALL
SELECT
    concat(id, '/refund') AS transaction_id,
    CASE WHEN customer IS NOT NULL THEN xxhash64(customer) END AS customer_id,
    'payment' AS product_id,
    '-1' AS quantity,
    -- A text that is no number is handed on, so that the row is rejected with it.
    coalesce(CAST(0 - try_cast(refunded AS DECIMAL(12, 2)) AS STRING), refunded) AS amount,
    currency,
    CASE WHEN refunded_at LIKE '____-__-__ __:__' THEN concat(refunded_at, ':00') ELSE refunded_at END AS timestamp,
    payment_method, 'returned' AS status,
    _delivery, _source_file, _source_row
FROM statuses
WHERE status = 'completed' AND refunded <> '' AND coalesce(try_cast(refunded AS DECIMAL(12, 2)), 1) <> 0
